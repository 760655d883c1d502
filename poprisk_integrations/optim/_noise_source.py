"""Noise measured within one step: from the pieces that its gradient is the sum of.

A piece is what one backward pass ("microbatch") or one rank ("ranks") contributes. Hooks on the
parameters see it before it is accumulated and before it is reduced over ranks.
"""

import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.utils.hooks import RemovableHandle, unserializable_hook

from poprisk_integrations.core.noise import deviation_scale, gradient_scale, sum_variance
from poprisk_integrations.distributed import (
    is_dtensor,
    same_on_all_ranks,
    sum_over_ranks,
    world_size,
)
from poprisk_integrations.optim._options import uses_pieces
from poprisk_integrations.optim._work import GroupWork, real_view

__all__ = ["NoiseSource"]

PROBES = 16  # coordinates per parameter that tell how the sum was rescaled
# Share of the gradient's square that its pieces may leave unexplained. Rounding of bfloat16
# gradients leaves about 1e-4 (64 pieces); clipping by value leaves most of it.
MISFIT = 0.01
UNEQUAL = 1e-6  # the same for replicas, which are equal bit for bit
_NOT_SHOWN = "has a gradient that no backward pass has shown"


@dataclass(slots=True, eq=False)
class _Record:
    """What a hook on one parameter has seen of its gradient since the last step."""

    param: Tensor
    name: str  # for messages
    source: str  # "microbatch" or "ranks"
    is_late: bool  # the hook was set in a step, after the backward pass
    handle: RemovableHandle = field(init=False)
    sums: Tensor | None = None  # sum_k y_k^2 ("microbatch") or sum_k y_k ("ranks"), of this rank
    probe: Tensor | None = None  # sum_k y_k at a few coordinates
    passes: int = 0  # backward passes that reached the parameter
    is_verified: bool = False  # its pieces were once found to add up to the gradient

    def __post_init__(self) -> None:
        # The hook knows this record and no optimizer, so it keeps none alive.
        @unserializable_hook  # type: ignore[untyped-decorator]
        @_disable_dynamo
        def take_piece(grad: Tensor) -> None:
            with torch.no_grad():
                self.take(grad)

        self.handle = self.param.register_hook(take_piece)  # type: ignore[no-untyped-call]

    def take(self, grad: Tensor) -> None:
        """Add one piece."""
        if grad.is_sparse:
            return  # refused by the step
        if self.param.grad is None:
            self.clear()  # what was left of a step that never came, e.g. for an overflow
        piece = real_view(grad)
        dtype = torch.promote_types(piece.dtype, torch.float32)
        probe = _probe(piece)
        if self.sums is None or self.probe is None:
            self.sums, self.probe = piece.to(dtype, copy=True), probe.to(dtype, copy=True)
            if self.source == "microbatch":
                self.sums.square_()
        else:
            if self.source == "microbatch":
                self.sums.addcmul_(piece, piece)
            else:
                self.sums.add_(piece)
            self.probe.add_(probe)
        self.passes += 1

    def clear(self) -> None:
        self.sums, self.probe, self.passes = None, None, 0

    def squares(self) -> Tensor:
        """This rank's share of sum_k y_k^2; zeros where no pass reached the parameter."""
        if self.sums is None:
            param = real_view(self.param)
            return torch.zeros_like(param, dtype=torch.promote_types(param.dtype, torch.float32))
        return self.sums if self.source == "microbatch" else self.sums.square_()

    def problem(self, what: str) -> str:
        """The message of a refusal."""
        return (
            f"noise_source={self.source!r}: {self.name} {what}. Gradients must come from "
            "backward() on the very parameters of the optimizer, as with one process or DDP; "
            "FSDP1 and DeepSpeed hide them. Use noise_source='temporal' there."
        )


class NoiseSource:
    """Updates `exp_dev_sq` and `dev_step` of the groups whose `noise_source` is not "temporal".

        s_t = rho * s_{t-1} + (1 - rho) * Var(g_t) * 2 / (1 + beta1)

    with Var of `core.noise.sum_variance`: the variance of the batch MEAN gradient, unbiased. With N
    pieces s_hat has (N-1)(1+rho)/(1-rho) degrees of freedom, so a pure-noise coordinate passes
    with the tail of Student's t: 5.1 % instead of 5 % for N=2 and rho=0.99, 6.5 % for rho=0.9.

    One per optimizer, never copied or saved: hooks belong to the parameters of this process, and
    go when the source does.

    What happens to the gradient between the last backward pass and the step (division by the
    number of ranks, unscaling of the loss, clipping by norm) is found from a few coordinates of
    each parameter, as the factor c of `core.noise.gradient_scale`. It must be one factor for all.

    Buffers live from the first backward pass of a step to its end: one float32 tensor per
    parameter.
    """

    def __init__(self) -> None:
        self._records: dict[int, _Record] = {}
        self._has_seen_many = False
        self._has_seen_one = False
        finalizer = weakref.finalize(self, _remove_hooks, self._records)
        finalizer.atexit = False

    def watch(self, groups: list[dict[str, Any]], *, is_late: bool = False) -> None:
        """Set hooks on the parameters of the groups, and remove those no longer needed.

        `is_late`: the gradients of the next step exist already.
        """
        wanted = dict(_wanted(groups))
        for param, name, source in wanted.values():
            if is_dtensor(param):
                raise ValueError(
                    f"Invalid noise_source: {source!r} for {name}, a DTensor (FSDP2, HSDP, tensor "
                    "parallelism). Must be 'temporal': gradients are reduced before they can be "
                    "seen."
                )
        for key, record in list(self._records.items()):
            if key not in wanted or wanted[key][2] != record.source:
                record.handle.remove()
                del self._records[key]
        for key, (param, name, source) in wanted.items():
            if key not in self._records:
                self._records[key] = _Record(param, name, source, is_late)

    def check(self, groups: list[dict[str, Any]], *, is_fresh: bool) -> None:
        """Refuse a step whose pieces cannot be what the option promises.

        Called before anything changes; only counts and shapes on the host are looked at. A run
        with states already (not `is_fresh`) was resumed, and may start with a short step.
        """
        self.watch(groups, is_late=True)
        due = [r for r in self._records.values() if r.param.grad is not None]
        if not due:
            return
        world = world_size()
        for record in due:
            if record.source == "ranks" and world < 2:
                raise RuntimeError(
                    "noise_source='ranks' needs at least 2 ranks of torch.distributed, found "
                    f"{world}. Use 'microbatch' with gradient accumulation, or 'temporal'."
                )
            if record.sums is not None and record.sums.shape != real_view(record.param).shape:
                raise RuntimeError(record.problem("has pieces of another shape"))
        passes = max(r.passes for r in due)
        # A step on zero gradients materialises states (checkpoint templates): it has no pieces.
        if passes == 0 and any(bool(r.param.grad.any()) for r in due):  # type: ignore[union-attr]
            raise RuntimeError(due[0].problem(_NOT_SHOWN))
        counts = [r.passes for r in due if r.source == "microbatch"]
        if world == 1 and counts and max(counts) == 1:
            # Trainers end an epoch with a short step: one of them is no misuse.
            if not self._has_seen_many and (is_fresh or self._has_seen_one):
                raise RuntimeError(
                    "noise_source='microbatch' needs at least 2 backward passes per step, found "
                    "1: set the gradient accumulation steps to 2 or more, or use 'temporal'."
                )
            self._has_seen_one = True
        elif counts and max(counts) > 1:
            self._has_seen_many = True

    @torch.no_grad()
    def update(
        self,
        works: list[GroupWork],
        groups: list[dict[str, Any]],
        keep: Tensor | None,
        grad_scale: Tensor | None = None,
    ) -> None:
        """Take the step's pieces into s, and forget them.

        `keep` and `grad_scale` are those of the step; no `keep` means no gradient. Once per
        parameter it is checked that the pieces add up to the gradient, with a host read.
        """
        if keep is not None:
            self._update(works, groups, keep, grad_scale)
        for record in self._records.values():
            record.clear()
            record.is_late = False

    def _update(
        self,
        works: list[GroupWork],
        groups: list[dict[str, Any]],
        keep: Tensor,
        grad_scale: Tensor | None,
    ) -> None:
        world = world_size()
        records = [
            record
            for record in self._records.values()
            if not record.is_late and (world > 1 or record.param.grad is not None)
        ]
        if not records:
            return
        is_first = not all(r.is_verified for r in records)
        if is_first and world > 1:
            _check_same_layout(records)
        for record in records:
            if record.param.grad is None:
                record.clear()  # left of a step that never came; this one has nothing for it
        count = len(records)
        device = records[0].param.device
        passes = max((r.passes for r in records if r.source == "microbatch"), default=0)
        flat = [r.squares() for r in records]
        flat += [_probe(real_view(r.param)) * 0.0 if r.probe is None else r.probe for r in records]
        flat.append(torch.full((1,), float(passes), device=device))  # no copy from the host
        flat = sum_over_ranks(flat)
        squares = dict(zip((id(r.param) for r in records), flat[:count], strict=True))
        seen = torch.cat([p.to(device) for p in flat[count:-1]])
        total = torch.cat([_grad_probe(r).to(seen) for r in records])
        scale = gradient_scale(total, seen, default=1.0 / world)
        pieces: dict[str, float | Tensor] = {
            "microbatch": float(passes) if world == 1 else flat[-1].reshape(()),
            "ranks": float(world),
        }
        if is_first:
            self._verify(records, total, scale * seen)
        sizes = torch.stack([s.sum().to(device) for s in flat[:count]])
        counts_now = keep.to(device) * sizes.isfinite().all() * scale.isfinite()
        for work, group in zip(works, groups, strict=True):
            source = group["noise_source"]
            if not uses_pieces(group) or (source == "microbatch" and world == 1 and passes < 2):
                continue
            for i, owner in enumerate(work.owners):
                if id(owner) not in squares:
                    continue
                sum_sq, count_of = squares[id(owner)], pieces[source]
                if isinstance(count_of, Tensor):
                    count_of = count_of.to(sum_sq)
                variance = sum_variance(sum_sq, work.grads[i], count_of, scale.to(sum_sq))
                if grad_scale is not None:
                    variance = variance / grad_scale.to(variance).square()
                _take(work, i, variance, counts_now.to(sum_sq.device), group)

    def _verify(self, records: list[_Record], total: Tensor, explained: Tensor) -> None:
        """Once per parameter, with a host read: do the pieces make up the gradient?

        Compares some coordinates of the gradient with c times the sum of the pieces there.
        """
        passes = torch.stack([total.new_full((), float(r.passes)) for r in records])
        mean, all_passes = sum_over_ranks([total / world_size(), passes])
        errors = [_share(total - mean, mean), _share(mean - explained, mean)]
        host = torch.cat([torch.stack(errors), all_passes]).tolist()
        source, (unequal, unexplained, *seen) = records[0].source, host
        for record, count in zip(records, seen, strict=True):
            grad = record.param.grad
            if not record.is_verified and not count and grad is not None and bool(grad.any()):
                raise RuntimeError(record.problem(_NOT_SHOWN))
        if unequal > UNEQUAL:
            raise RuntimeError(
                f"noise_source={source!r} needs gradients that are averaged over ranks, as DDP "
                "does, but this rank's differ from the mean. Use noise_source='temporal' otherwise."
            )
        if unexplained > MISFIT:
            raise RuntimeError(
                f"noise_source={source!r}: the pieces seen in backward passes do not add up to the "
                f"gradients of this step ({unexplained:.0%} of the square is unexplained). "
                "Gradients may only be rescaled by one factor: no clipping by value, no gradients "
                "from elsewhere, and zeroed after each step. Use noise_source='temporal' otherwise."
            )
        if math.isfinite(unexplained) and any(seen):
            for record in records:
                record.is_verified = True


def _take(
    work: GroupWork, index: int, variance: Tensor, counts: Tensor, group: dict[str, Any]
) -> None:
    """Update s and its count; both stay as they are, bit for bit, if the step does not count."""
    rho, weight = group["rho"], (1.0 - group["rho"]) * deviation_scale(group["betas"][0])
    # float32 by `check_group`: the pieces leave no step to draw the rounding from
    exp_dev_sq, dev_step = work.exp_dev_sqs[index].read(), work.dev_steps[index]
    precise = torch.float32 if exp_dev_sq.device.type == "mps" else torch.float64
    decay = torch.where(counts > 0, rho, torch.ones_like(counts, dtype=precise))
    variance = torch.where(counts > 0, variance, 0.0)
    exp_dev_sq.mul_(decay).add_(variance.to(exp_dev_sq.dtype), alpha=weight)
    dev_step += counts.to(dev_step)


def _share(error: Tensor, whole: Tensor) -> Tensor:
    """|error|^2 / |whole|^2, 0 where both are zero."""
    largest = whole.abs().amax()
    unit = torch.where(largest == 0, 1.0, largest)
    tiny = torch.finfo(whole.dtype).tiny
    return (error / unit).square().sum() / (whole / unit).square().sum().clamp(min=tiny)


def _check_same_layout(records: list[_Record]) -> None:
    """Replicas hold the same parameters; shards of an optimizer (ZeRO) do not."""
    numel = sum(r.param.numel() for r in records)
    if not same_on_all_ranks([len(records), numel], records[0].param.device):
        raise RuntimeError(
            f"noise_source={records[0].source!r} needs the same parameters on all ranks, as under "
            f"DDP, but they differ: {len(records)} parameters of {numel} elements on this rank. "
            "Use noise_source='temporal' with sharded optimizers."
        )


def _wanted(groups: list[dict[str, Any]]) -> Iterator[tuple[int, tuple[Tensor, str, str]]]:
    for index, group in enumerate(groups):
        if not uses_pieces(group):
            continue
        names = group.get("param_names")
        for offset, param in enumerate(group["params"]):
            if param.requires_grad and param.numel():
                name = f"parameter {offset} of group {index}"
                if names:
                    name = f"{names[offset]!r} ({name})"
                yield id(param), (param, name, group["noise_source"])


def _remove_hooks(records: dict[int, _Record]) -> None:
    for record in records.values():
        record.handle.remove()


def _probe(tensor: Tensor) -> Tensor:
    """Up to 16 elements spread over the first dimension, 1-d; the same for any memory layout."""
    if tensor.dim() == 0:
        return tensor.reshape(1)
    rows = tensor[:: -(-tensor.shape[0] // PROBES)]
    while rows.dim() > 1:
        rows = rows.select(1, 0)
    return rows


def _grad_probe(record: _Record) -> Tensor:
    grad = record.param.grad
    return _probe(real_view(record.param)) * 0.0 if grad is None else _probe(real_view(grad))

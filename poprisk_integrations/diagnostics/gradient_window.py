"""Accumulates batch gradients over a window of optimizer steps and closes it with F."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from poprisk_integrations.core.standard_error import mean_standard_error
from poprisk_integrations.core.window import WindowRatio, window_signal_ratio
from poprisk_integrations.diagnostics.coordinate_sample import FlatVector
from poprisk_integrations.diagnostics.gradient_agreement import GradientAgreement
from poprisk_integrations.diagnostics.pending_steps import PendingSteps
from poprisk_integrations.diagnostics.step_displacement import StepDisplacement
from poprisk_integrations.diagnostics.window_layout import WindowLayout, real_view
from poprisk_integrations.diagnostics.window_rows import StepRows
from poprisk_integrations.diagnostics.window_state import check_state, copy_state, state_misfit
from poprisk_integrations.diagnostics.window_sums import ExactSums, SampledSums
from poprisk_integrations.distributed import is_dtensor, mean_over_ranks

__all__ = ["SHORTEST_WINDOW", "GradientWindow"]

SHORTEST_WINDOW = 4  # with fewer, the variance of a coordinate has no mean inverse

# Pairs of consecutive steps in a long window, behind risk decrease and agreement: their standard
# error grows with fewer of them, the cost of a step with more (recipes/benchmarks/stop_cost).
PAIRS = 24


def pair_stride(steps: int) -> int:
    """Every how many steps of a window a pair of consecutive steps ends.

    1 in windows below 72 steps; every second step would read as much as every step.

    Example:
        >>> pair_stride(71), pair_stride(72), pair_stride(100), pair_stride(1000)
        (1, 3, 4, 41)
    """
    stride = steps // PAIRS
    return stride if stride > 2 else 1


class GradientWindow:
    """Running sums A_l = sum_t g_t and |g_t|^2 per tensor and step, for any optimizer.

    Call `add` once per optimizer step, before the step, when the gradients are complete: averaged
    over micro-batches and ranks, unscaled, and best unclipped (`scale` undoes both). Gradients
    are read, never written. A step with a non-finite gradient (a skipped fp16 step) is left out,
    decided on the device: no host sync before the window closes, and no communication, but for
    one reduction of L numbers per step where tensors are sharded. A window closes with F, its
    standard error, the population-risk decrease along the steps that were taken, and the
    agreement of consecutive batches (`core.WindowRatio`, `StepDisplacement`, `GradientAgreement`).

    Args:
        steps: Optimizer steps in a window, >= 4.
        accumulator: "exact" keeps two fp32 buffers per trained parameter, 8 bytes each. "sample"
            reads 16,384 fixed coordinates of each large tensor (`CoordinateSample`), also for
            |g_t|^2 and to tell whether a step is finite: 12 bytes per sampled coordinate (on the
            CPU 40, for steps wait in groups of eight), 45 MB for a model of 7B parameters instead
            of 54 GB. "auto": exact while a process trains at most 25 million parameters, where it
            costs 200 MB or less.
        shard_group: Process group over which tensors that are no DTensors are sharded (FSDP1,
            DeepSpeed ZeRO). A rank may hold an empty shard, or no gradient where others do.
        measure_risk: Whether to measure risk decrease and agreement, from the sampled coordinates
            with either accumulator: 12 to 16 bytes more per sampled coordinate (on the CPU 40
            to 72). Windows of 72 steps or more measure 24 to 31 pairs of consecutive steps,
            evenly spread; the standard error is that of the terms measured, serial correlation
            between them allowed for.
        epoch_steps: Optimizer steps of one pass over the data; None if unknown. A longer window
            sees each example more than once, which F allows for.

    Attributes:
        restarts: Unfinished windows given up since the last close, for other parameters.

    Raises:
        ValueError: If `steps` < 4 or `accumulator` is unknown.

    Example:
        >>> p = torch.nn.Parameter(torch.zeros(()))
        >>> window = GradientWindow(steps=5)
        >>> for g in (1.0, 3.0, 2.0, 1.0, 3.0):  # sum 10, variance 1
        ...     p.grad = torch.tensor(g)
        ...     window.add([p])
        >>> window.is_full, round(window.close().ratio, 3)  # (5-3)/(5-1) * 10^2 / (5 * 1)
        (True, 10.0)
    """

    def __init__(
        self,
        steps: int,
        *,
        accumulator: Literal["auto", "exact", "sample"] = "auto",
        shard_group: Any = None,
        measure_risk: bool = True,
        epoch_steps: int | None = None,
    ) -> None:
        if steps < SHORTEST_WINDOW:
            raise ValueError(
                f"Invalid steps: {steps}. A window needs at least {SHORTEST_WINDOW} steps."
            )
        if accumulator not in ("auto", "exact", "sample"):
            raise ValueError(
                f"Invalid accumulator: {accumulator!r}. Must be 'auto', 'exact' or 'sample'."
            )
        self.steps = steps
        self.accumulator = accumulator
        self.measure_risk = measure_risk
        self._stride = pair_stride(steps)
        self._passes = max(1.0, steps / epoch_steps) if epoch_steps else 1.0
        self._shard_group = shard_group
        self.restarts = 0
        self.reset()

    @property
    def is_full(self) -> bool:
        """Whether `steps` optimizer steps were offered since the last close."""
        return self._seen >= self.steps

    @property
    def seen(self) -> int:
        """Optimizer steps in the unfinished window."""
        return self._seen

    @torch.no_grad()
    def add(
        self,
        params: Iterable[Tensor],
        *,
        grads: Sequence[Tensor | None] | None = None,
        scale: float | Tensor = 1.0,
    ) -> None:
        """Take in the gradients of one optimizer step, before the step.

        Sums go by position, so a window in which the trained parameters change (frozen, thawed,
        a group added), or whose loaded state does not fit them, starts afresh with this step.
        Who only watches a run must not end it; `restarts` tells.

        Args:
            params: The optimizer's parameters, in the same order at each call. Those without a
                gradient contribute zero.
            grads: Their gradients, one for each or None; None for `.grad` of the parameters that
                require one.
            scale: Multiplies all gradients of this step: a number, or 0-dim on their device.

        Raises:
            ValueError: If their number is not that of `grads`.
        """
        tensors, gradients = _columns(params, grads)
        layout = self._layout_of(tensors) if tensors else None
        self._seen += 1
        if layout is None or (self._shard_group is None and all(g is None for g in gradients)):
            return
        assert self._sums is not None
        assert self._norm_sq is not None
        if self._taken == 0:
            self._is_plain = all(g is None or _is_plain(g) for g in gradients)
        if not self._is_plain:
            gradients = [None if g is None else _plain(g) for g in gradients]
        read = layout.to_locals(gradients)
        scale = _plain_scale(scale, layout.on_host)
        is_exact = isinstance(self._sums, ExactSums)
        if is_exact:
            self._count(self._sums, read, scale)
        phase = self._taken % self._stride
        self._taken += 1
        is_paired = self._displacement is not None and phase >= self._stride - 2
        if self._pending is not None and (is_paired or not is_exact):
            weights = layout.to_locals(tensors) if is_paired else None
            self._pending.read(read, scale, weights, phase == self._stride - 1)
            if self._pending.is_full:
                self._work_off()

    @torch.no_grad()
    def place(self, params: Iterable[Tensor]) -> None:
        """Give a loaded window its tensors without a step, so that a full one can be closed."""
        tensors, _ = _columns(params, None)
        if tensors:
            self._layout_of(tensors)

    @torch.no_grad()
    def close(self) -> WindowRatio | None:
        """End the window: reduce over shards and ranks, return what was measured, start afresh.

        One host sync. All ranks get the same bits, so all decide alike.

        Returns:
            F and the rest, or None where fewer than four finite steps were seen.
        """
        self._work_off()
        self.restarts = 0
        layout, sums, rows = self._layout, self._sums, self._norm_sq
        displacement, agreement = self._displacement, self._agreement
        if self._loaded is not None:  # of tensors that never came
            self.reset()
        if layout is None or sums is None or not rows:
            self._start_window()
            return None
        norm_sq = rows.stacked()
        counted = norm_sq.sum(1).isfinite().sum()
        blocks = [
            norm_sq,
            layout.sum(sums.norms_of_sum().square())[None],
            layout.sum(sums.coordinate_ratios(int(counted) if layout.on_host else counted)),
        ]
        if displacement is not None and agreement is not None:
            products = displacement.rows.stacked()
            blocks += [layout.sum(products[:, :-1].contiguous()), layout.max(products[:, -1:])]
            blocks.append(layout.sum(agreement.rows.stacked()))
        flat = mean_over_ranks(torch.cat([block.flatten() for block in blocks])).double().cpu()
        parts = flat.split_with_sizes([block.numel() for block in blocks])
        host = [part.view(block.shape) for part, block in zip(parts, blocks, strict=True)]
        self._start_window()
        is_finite = host[0].sum(1).isfinite()
        steps = int(is_finite.sum())
        if steps < SHORTEST_WINDOW:
            return None
        scale = layout.numel / sums.measured.clamp(min=1)
        norm_sq = host[0][is_finite] * scale
        result = window_signal_ratio(
            host[1][0] * scale,
            norm_sq.sum(0),
            layout.numel,
            steps,
            norm_sq=norm_sq,
            passes=self._passes,
        )
        white, alive = (host[2] * scale).sum(1).tolist()
        if alive > 0 and not math.isnan(result.ratio):
            result = replace(result, ratio=white / alive / self._passes)
        if displacement is None or agreement is None:
            return result
        scale = layout.numel / layout.sampled.clamp(min=1)
        per_step = (host[3] * scale).sum(1)
        # A step that was not applied says nothing about the direction of those that were.
        counts = is_finite[self._stride - 1 :: self._stride]
        counts = counts & per_step.isfinite() & (host[4][:, 0] > 0)
        gain, gain_se = mean_standard_error(per_step[counts])
        agreed, agreed_se = mean_standard_error(_in_units_of_noise(host[5] * scale, result, layout))
        return replace(
            result,
            risk_decrease=gain,
            risk_decrease_se=gain_se,
            agreement=agreed,
            agreement_se=agreed_se,
        )

    def reset(self) -> None:
        """Forget the unfinished window, and the weights of the last step."""
        self._seen = 0  # steps offered, finite or not: known on the host
        self._taken = 0  # of them with gradients, and so with a row in `_norm_sq`
        self._norm_sq: StepRows | None = None  # |g_t,l|^2 of every step, finite or not
        self._layout: WindowLayout | None = None
        self._sums: ExactSums | SampledSums | None = None
        self._pending: PendingSteps | None = None
        self._displacement: StepDisplacement | None = None
        self._agreement: GradientAgreement | None = None
        self._is_plain = True  # no gradient is sparse, complex or float64, as of the first step
        self._loaded: dict[str, Any] | None = None  # waits for the tensors that it belongs to

    def state_dict(self) -> dict[str, Any]:
        """The unfinished window and the last weights: numbers, strings and tensors.

        Of sharded tensors it holds the local shards' part.
        """
        if self._loaded is not None:
            return copy_state(self._loaded)
        self._work_off()
        displacement = self._displacement
        state: dict[str, Any] = {
            "accumulator": self.accumulator if self._layout is None else self._layout.accumulator,
            "seen": self._seen,
            "counted": None,
            "sums": {},
            "squares": {},
            "norm_sq": None,
            "previous": {},
            "products": None,
            "last_grads": {},
            "agreements": None,
        }
        if self._sums is not None and self._norm_sq:
            state["sums"], state["squares"] = self._sums.state()
            state["norm_sq"] = self._norm_sq.stacked()
            state["counted"] = state["norm_sq"].sum(1).isfinite().sum()
        if displacement is not None and displacement.previous is not None:
            state["previous"] = {str(i): t.clone() for i, t in enumerate(displacement.previous)}
            if displacement.rows:
                state["products"] = displacement.rows.stacked()
        agreement = self._agreement
        if agreement is not None and agreement.last_grads is not None:
            state["last_grads"] = {str(i): t.clone() for i, t in enumerate(agreement.last_grads)}
            if agreement.rows:
                state["agreements"] = agreement.rows.stacked()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue an unfinished window; tensors move to their parameters' device.

        The tensors are compared with the parameters at the next `add`; `window_fits` asks before.

        Raises:
            ValueError: If the state is of another accumulator or of an older version.
        """
        check_state(state_dict)
        saved, wanted = state_dict["accumulator"], self.accumulator
        if "auto" not in (saved, wanted) and saved != wanted:
            raise ValueError(f"The state is of accumulator={saved!r}, the window has {wanted!r}.")
        self.reset()
        self._loaded = copy_state(state_dict)
        self._seen = int(state_dict["seen"])

    def _count(
        self, sums: Any, grads: Sequence[Tensor | None] | FlatVector, scale: float | Tensor
    ) -> None:
        """Add one step to the sums, if it is finite, and its norms to the rows."""
        assert self._layout is not None
        assert self._norm_sq is not None
        row = _squared(self._norm_sq.row(sums.norms(grads)), scale)
        if self._layout.is_sharded:  # the same verdict on all shards: the total is finite or not
            row = self._layout.sum_row(row)
        self._norm_sq.append(row)
        if not isinstance(row, list):
            sums.add_(grads, scale, torch.isfinite(row.sum()))
        elif math.isfinite(sum(row)):
            sums.add_(grads, scale, None)

    @torch.no_grad()
    def _work_off(self) -> None:
        """Count the steps that were only read."""
        if self._pending is None:
            return
        for grads, weights, is_second in self._pending.drain():
            if isinstance(self._sums, SampledSums):
                self._count(self._sums, grads, 1.0)
            if weights is None:
                continue
            assert self._displacement is not None
            assert self._agreement is not None
            if is_second:
                self._displacement.add(weights, grads)
                self._agreement.add(grads)
            else:
                self._displacement.remember(weights)
                self._agreement.remember(grads)

    def _start_window(self) -> None:
        self._seen = self._taken = 0
        if self._sums is not None and self._norm_sq is not None:
            self._sums.zero_()
            self._norm_sq.load(None)
        if self._displacement is not None and self._agreement is not None:
            self._displacement.start_window()
            self._agreement.start_window()

    def _layout_of(self, tensors: Sequence[Tensor]) -> WindowLayout:
        if self._layout is not None and self._layout.is_of(tensors):
            return self._layout
        layout = WindowLayout(tensors, self.accumulator, self._shard_group)
        loaded, seen = self._loaded, self._seen
        is_other = self._layout is not None and seen > 0
        if is_other or (loaded is not None and state_misfit(loaded, layout)):
            loaded, seen = None, 0
            self.restarts += 1
        self.reset()
        self._layout, self._seen = layout, seen
        self._norm_sq = StepRows(layout.device, layout.on_host)
        is_exact = layout.accumulator == "exact"
        self._sums = ExactSums(layout) if is_exact else SampledSums(layout)
        if self.measure_risk:
            self._displacement = StepDisplacement(layout)
            self._agreement = GradientAgreement(layout)
        if self.measure_risk or not is_exact:
            self._pending = PendingSteps(layout, with_weights=self.measure_risk)
        if loaded is not None:
            self._take(loaded, layout)
        return layout

    def _take(self, state: Mapping[str, Any], layout: WindowLayout) -> None:
        assert self._sums is not None
        assert self._norm_sq is not None
        self._sums.load(state["sums"], state["squares"])
        self._norm_sq.load(state["norm_sq"])
        self._taken = len(self._norm_sq)
        displacement, agreement = self._displacement, self._agreement
        if displacement is None or agreement is None:
            return
        columns, pairs = range(len(layout.locals)), self._taken // self._stride
        if state["previous"]:
            displacement.previous = [state["previous"][str(i)] for i in columns]
        if state["last_grads"]:
            agreement.last_grads = [state["last_grads"][str(i)] for i in columns]
        for part, saved in (
            (displacement, state["products"]),
            (agreement, state["agreements"]),
        ):
            if saved is None or len(saved) != pairs:  # not measured, or with another stride
                part.pad(pairs)
            else:
                part.rows.load(saved)


def _in_units_of_noise(products: Tensor, window: WindowRatio, layout: WindowLayout) -> Tensor:
    """Sum over tensors of w_l U_t,l / S_l, one number per step with a finite product."""
    noisy = window.per_tensor.isfinite()
    weight = torch.where(noisy, layout.numel, 0.0)
    per_step = products @ torch.where(noisy, weight / weight.sum() / window.noise, 0.0)
    return per_step[per_step.isfinite()]


def _columns(
    params: Iterable[Tensor], grads: Sequence[Tensor | None] | None
) -> tuple[list[Tensor], list[Tensor | None]]:
    if grads is None:
        tensors = [p for p in params if p.requires_grad]
        return tensors, [p.grad for p in tensors]
    tensors = list(params)
    if len(grads) != len(tensors):
        raise ValueError(f"Invalid grads: {len(grads)} for {len(tensors)} parameters.")
    return tensors, list(grads)


def _is_plain(grad: Tensor) -> bool:
    is_wide = grad.dtype is torch.float64 or grad.is_complex()
    return grad.layout is torch.strided and not is_wide


def _plain(grad: Tensor) -> Tensor:
    """Dense, real and fp32 at most, as the window's buffers are."""
    plain = real_view(grad if grad.layout is torch.strided else grad.to_dense())
    return plain.float() if plain.dtype is torch.float64 else plain


def _plain_scale(scale: float | Tensor, on_host: bool) -> float | Tensor:
    if not isinstance(scale, Tensor):
        return scale
    if is_dtensor(scale):
        scale = scale.full_tensor()  # type: ignore[attr-defined]
    return float(scale) if on_host else scale.to(torch.float32)  # type: ignore[union-attr]


def _squared(row: Tensor | list[float], scale: float | Tensor) -> Tensor | list[float]:
    if isinstance(row, Tensor):
        return (row * scale).square_()
    assert not isinstance(scale, Tensor)
    return [(norm * scale) ** 2 for norm in row]

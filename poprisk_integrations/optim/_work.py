"""What a step works on: plain local tensors of one group, gathered once per step, and its verdict.

The verdict is one number for all groups: are all gradients finite, and so are the squares that
the states hold?
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from poprisk_integrations.distributed import local_tensor, max_over_shards
from poprisk_integrations.optim._options import MOMENTS, GroupOptions
from poprisk_integrations.optim._rounding import global_index, rounding_key, to_bfloat16, uniform16
from poprisk_integrations.optim._states import Moment, moment_of

__all__ = ["GroupWork", "PooledGate", "memory_order", "real_view", "verdict"]

# Temporaries of horizontally fused kernels stay below this many elements (a larger tensor aside).
CHUNK_NUMEL = 1 << 24


class PooledGate(NamedTuple):
    """The gate that all coordinates of a row or a tensor share, see `_pooled.py`.

    Shapes broadcast to the parameter: (rows, 1, ...) or ().
    """

    gate: Tensor  # q as applied, after `gate_blend`; 1 while the update is ungated
    is_open: Tensor
    is_dead: Tensor  # closed for want of any gradient


@dataclass(slots=True)
class GroupWork:
    """Lists over the parameters of one group that have a gradient.

    The tensors are local shards (of DTensors) and real views (of complex tensors) that share
    memory with parameters and states, so elementwise work on them is work on the originals.
    """

    owners: list[Tensor] = field(default_factory=list)  # as the user knows them
    positions: list[int] = field(default_factory=list)  # over all groups; seed the rounding
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)  # never written
    exp_avgs: list[Moment] = field(default_factory=list)  # m
    exp_avg_sqs: list[Moment] = field(default_factory=list)  # v
    exp_dev_sqs: list[Moment] = field(default_factory=list)  # s; empty where it is read off m and v
    steps: list[Tensor] = field(default_factory=list)  # 0-dim
    dev_steps: list[Tensor] = field(default_factory=list)  # 0-dim: deviations in s; or empty
    pooled: list[PooledGate] = field(
        default_factory=list
    )  # empty where each coordinate has its own

    def append(self, param: Tensor, grad: Tensor, position: int, state: dict[str, Tensor]) -> None:
        """Add one parameter with its gradient and states."""
        self.owners.append(param)
        self.positions.append(position)
        self.params.append(real_view(param))
        self.grads.append(real_view(grad))
        self.exp_avgs.append(moment_of(state, "exp_avg"))
        self.exp_avg_sqs.append(moment_of(state, "exp_avg_sq"))
        self.steps.append(state["step"])
        if "dev_step" in state:
            self.exp_dev_sqs.append(moment_of(state, "exp_dev_sq"))
            self.dev_steps.append(state["dev_step"])

    def moments(self, index: int) -> tuple[Moment, ...]:
        """M, v and s of one parameter; without s where there is none."""
        moments = self.exp_avgs[index], self.exp_avg_sqs[index]
        return (*moments, self.exp_dev_sqs[index]) if self.exp_dev_sqs else moments

    def only(self, indices: Iterable[int]) -> "GroupWork":
        """The work on some of the parameters."""
        chosen = list(indices)
        lists = (getattr(self, name) for name in self.__slots__)
        return GroupWork(*([values[i] for i in chosen] if values else [] for values in lists))

    def parts(self, likeness: Callable[[int], Hashable]) -> list[list[int]]:
        """Indices of parameters that kernels can take together, because they are alike.

        Parts hold at most `CHUNK_NUMEL` elements, or one larger parameter: such kernels make
        several temporaries of the size of the part.
        """
        parts: list[list[int]] = []
        open_parts: dict[Hashable, tuple[list[int], int]] = {}
        for i, param in enumerate(self.params):
            key = likeness(i)
            part, size = open_parts.get(key, ([], CHUNK_NUMEL + 1))
            if size + param.numel() > CHUNK_NUMEL:
                part, size = [], 0
                parts.append(part)
            part.append(i)
            open_parts[key] = (part, size + param.numel())
        return parts

    def write_back(
        self,
        index: int,
        param: Tensor,
        moments: Sequence[Tensor],
        options: GroupOptions,
    ) -> None:
        """Round updated working copies into a low-precision parameter and its states."""
        target, stored = self.params[index], self.moments(index)
        if param is target and all(moment.kind == "float32" for moment in stored):
            return
        place = global_index(self.owners[index], target)
        key = rounding_key(self.steps[index], self.positions[index], options.rounding_seed)
        if param is not target:
            if target.dtype == torch.bfloat16 and options.stochastic_rounding:
                param = to_bfloat16(param, uniform16(place, key, "param"))
            target.copy_(param)
        for name, moment, values in zip(MOMENTS, stored, moments, strict=False):
            if moment.kind != "float32":
                moment.write(values, uniform16(place, key, name))


def real_view(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor, of a complex one its real and imaginary parts."""
    # Unwrap first: the detach of a DTensor is dispatched in Python, that of its shard is not.
    tensor = local_tensor(tensor).detach()
    return torch.view_as_real(tensor.resolve_conj()) if torch.is_complex(tensor) else tensor


def memory_order(tensor: Tensor) -> tuple[tuple[int, int], ...] | None:
    """(stride, size) from the fastest dimension on; None if elements overlap or leave gaps."""
    order = sorted(
        (stride, size, dim)
        for dim, (stride, size) in enumerate(zip(tensor.stride(), tensor.shape, strict=True))
        if size != 1
    )
    expected = 1
    for stride, size, _ in order:
        if stride != expected:
            return None
        expected *= size
    return tuple((dim, stride) for stride, _, dim in order)


def verdict(
    works: Sequence[GroupWork], checked: Sequence[bool], found_inf: Tensor | None
) -> Tensor | None:
    """1 if the step may count, 0 if it must be skipped; the same on all shards of a DTensor.

    One read of the gradients of the groups that are `checked`, unless GradScaler has looked at this
    rank's gradients already and found what is in `found_inf`. No host sync: the verdict is on the
    first parameter's device. None without any gradient.
    """
    first = next((work.params[0] for work in works if work.params), None)
    if first is None:
        return None
    if found_inf is not None:
        bad = (local_tensor(found_inf).reshape(()) > 0).float()
        return 1.0 - max_over_shards(bad, [p for work in works for p in work.owners])
    bad = torch.zeros((), device=first.device)
    works = [work for work, is_checked in zip(works, checked, strict=True) if is_checked]
    batches: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for work in works:
        for grad in work.grads:
            if grad.numel():
                batches.setdefault((grad.device, grad.dtype), []).append(grad)
    for (_, dtype), grads in batches.items():
        # The 2-norm: on CPU the maximum norm is an order of magnitude slower. A gradient whose
        # square overflows would leave an infinite second moment behind, so it does not count as
        # finite; a deviation from the mean is at most about twice the largest gradient.
        norms = torch.stack(torch._foreach_norm(grads))
        squares = (4 * norms.to(torch.promote_types(dtype, torch.float32))).square()
        bad = torch.maximum(bad, (~torch.isfinite(squares).all()).float().to(bad.device))
    return 1.0 - max_over_shards(bad, [p for work in works for p in work.owners])

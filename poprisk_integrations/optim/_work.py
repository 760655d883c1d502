"""What a step works on: plain local tensors of one group, gathered once per step, and its verdict.

The verdict is one number for all groups: are all gradients finite, and so are the squares that
the states hold?
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from poprisk_integrations.distributed import local_tensor, max_over_shards
from poprisk_integrations.optim._options import MOMENTS, GroupOptions, kept_moments
from poprisk_integrations.optim._rounding import global_index, rounding_key, to_bfloat16, uniform16
from poprisk_integrations.optim._states import COUNTS, WIDE_DTYPES, Moment, fit_state, moment_of

__all__ = ["GroupWork", "PooledGate", "memory_order", "real_view", "verdict"]

# Temporaries of horizontally fused kernels stay below this many elements (a larger tensor aside).
CHUNK_NUMEL = 1 << 24
_shape_of, _device_of, _dtype_of = map(attrgetter, ("shape", "device", "dtype"))


class PooledGate(NamedTuple):
    """The gate that all coordinates of a row or a tensor share, see `_pooled.py`.

    Shapes broadcast to the parameter: (rows, 1, ...) or ().
    """

    gate: Tensor  # q as applied, after `gate_blend`; 1 while the update is ungated
    is_open: Tensor
    is_dead: Tensor  # closed for want of any gradient


class GroupWork:
    """Lists over the parameters of one group that have a gradient.

    The tensors are local shards (of DTensors) and real views (of complex tensors) that share
    memory with parameters and states, so elementwise work on them is work on the originals. Views
    are made where they are first asked for: of thousands of small tensors they cost more than the
    arithmetic.
    """

    def __init__(self) -> None:
        self.owners: list[Tensor] = []  # as the user knows them
        self.owners_grads: list[Tensor] = []
        self.positions: list[int] = []  # over all groups; seed the rounding
        self.states: list[dict[str, Tensor]] = []
        self.pooled: list[PooledGate] = []  # empty where each coordinate has its own gate
        self._lists: dict[str, list[Any]] = {}

    @classmethod
    def of(cls, group: dict[str, Any], first: int, all_states: dict[Tensor, Any]) -> "GroupWork":
        """The work on a group whose parameters are numbered from `first` on."""
        work, params = cls(), group["params"]
        grads = [param.grad for param in params]
        chosen = [i for i, grad in enumerate(grads) if grad is not None]
        work.owners = [params[i] for i in chosen]
        work.owners_grads = [grads[i] for i in chosen]
        work.positions = [first + i for i in chosen]
        work.states = [all_states[owner] for owner in work.owners]
        if not work._fits(group):
            work._lists.clear()
            for state, param in zip(work.states, work.owners, strict=True):
                fit_state(state, param, group)
        return work

    def _fits(self, group: dict[str, Any]) -> bool:
        """Whether `fit_state` would change nothing; one look at many states is faster."""
        keys = kept_moments(group)
        counts = COUNTS[: len(keys) - 1]  # without s there is no count for it
        if len(counts) == 1 and any(["dev_step" in state for state in self.states]):
            return False
        try:
            columns = [self.state_list(key) for key in (*keys, *counts)][: len(keys)]
        except KeyError:  # a new state, or codes
            return False
        shapes, devices = list(map(_shape_of, self.owners)), list(map(_device_of, self.owners))
        dtypes = list(map(_dtype_of, self.owners))
        is_wide = not set(WIDE_DTYPES).isdisjoint(dtypes)
        return all(
            list(map(_shape_of, column)) == shapes
            and list(map(_device_of, column)) == devices
            and not (is_wide and list(map(_dtype_of, column)) != dtypes)
            for column in columns
        )

    def state_list(self, key: str) -> list[Tensor]:
        """One entry of all states, as it is kept.

        Raises:
            KeyError: If it is missing in one of them.
        """
        return self.listed(f"state {key}", lambda: [state[key] for state in self.states])

    def append(self, param: Tensor, grad: Tensor, position: int, state: dict[str, Tensor]) -> None:
        """Add one parameter with its gradient and states."""
        self.owners.append(param)
        self.owners_grads.append(grad)
        self.positions.append(position)
        self.states.append(state)

    @property
    def params(self) -> list[Tensor]:
        """What is trained."""
        return self.listed("params", lambda: [real_view(owner) for owner in self.owners])

    @property
    def grads(self) -> list[Tensor]:
        """Gradients, which are never written."""
        return self.listed("grads", lambda: [real_view(grad) for grad in self.owners_grads])

    @grads.setter
    def grads(self, values: list[Tensor]) -> None:
        self._lists["grads"] = values

    @property
    def exp_avgs(self) -> list[Moment]:
        """First moments m."""
        return self._moments_of("exp_avg")

    @property
    def exp_avg_sqs(self) -> list[Moment]:
        """Second moments v."""
        return self._moments_of("exp_avg_sq")

    @property
    def exp_dev_sqs(self) -> list[Moment]:
        """Noise variances s; empty where the noise is read off m and v."""
        return self._moments_of("exp_dev_sq") if self.has_noise else []

    @property
    def steps(self) -> list[Tensor]:
        """Step counts, 0-dim."""
        return self.state_list("step")

    @property
    def dev_steps(self) -> list[Tensor]:
        """Counts of deviations in s, 0-dim; empty without s."""
        return self.state_list("dev_step") if self.has_noise else []

    @property
    def has_noise(self) -> bool:
        """Whether s is a state."""
        return bool(self.states) and "dev_step" in self.states[0]

    def _moments_of(self, key: str) -> list[Moment]:
        return self.listed(key, lambda: [moment_of(state, key) for state in self.states])

    def listed(self, name: str, make: Callable[[], list[Any]]) -> list[Any]:
        """A list of something of each parameter, made once."""
        found = self._lists.get(name)
        if found is None:
            found = self._lists[name] = make()
        return found

    def moments(self, index: int) -> tuple[Moment, ...]:
        """M, v and s of one parameter; without s where there is none."""
        moments = self.exp_avgs[index], self.exp_avg_sqs[index]
        return (*moments, self.exp_dev_sqs[index]) if self.has_noise else moments

    def only(self, indices: Iterable[int]) -> "GroupWork":
        """The work on some of the parameters."""
        chosen, part = list(indices), GroupWork()
        for name in ("owners", "owners_grads", "positions", "states", "pooled"):
            values = getattr(self, name)
            setattr(part, name, [values[i] for i in chosen] if values else [])
        part._lists = {
            k: [values[i] for i in chosen] for k, values in self._lists.items() if values
        }
        return part

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
    return torch.view_as_real(tensor.resolve_conj()) if tensor.dtype.is_complex else tensor


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
    works: Sequence[GroupWork],
    checked: Sequence[bool],
    found_inf: Tensor | None,
    look: Callable[[Sequence[GroupWork]], bool | None] | None = None,
) -> Tensor | None:
    """1 if the step may count, 0 if it must be skipped; the same on all shards of a DTensor.

    One read of the gradients of the groups that are `checked`, unless GradScaler has looked at this
    rank's gradients already and found what is in `found_inf`. No host sync: the verdict is on the
    first parameter's device. None without any gradient. `look` is a faster look at gradients, which
    gives None where it cannot see them.
    """
    first = next((local_tensor(work.owners[0]) for work in works if work.owners), None)
    if first is None:
        return None
    if found_inf is not None:
        bad = (local_tensor(found_inf).reshape(()) > 0).float()
        return 1.0 - max_over_shards(bad, [p for work in works for p in work.owners])
    bad = torch.zeros((), device=first.device)
    works = [work for work, is_checked in zip(works, checked, strict=True) if is_checked]
    owners = [p for work in works for p in work.owners]
    seen = look(works) if look is not None else None
    if seen is not None:
        bad = bad + float(not seen)
        works = []
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
    return 1.0 - max_over_shards(bad, owners)

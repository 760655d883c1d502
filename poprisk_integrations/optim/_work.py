"""What a step works on: plain local tensors of one group, gathered once per step."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from poprisk_integrations.distributed import local_tensor
from poprisk_integrations.optim._moments import MOMENTS, Moment, moment_of
from poprisk_integrations.optim._options import GroupOptions
from poprisk_integrations.optim._rounding import (
    global_index,
    round_to_bfloat16_,
    rounding_key,
    uniform16,
)

__all__ = ["GroupWork"]

# Temporaries of one foreach call stay below this many elements (a single larger tensor aside).
CHUNK_NUMEL = 1 << 24


@dataclass(slots=True)
class GroupWork:
    """Lists over the parameters of one group that have a gradient.

    The tensors are local shards (of DTensors) and real views (of complex tensors) that share
    memory with parameters and states, so elementwise work on them is work on the originals.

    Attributes:
        owners: The parameters as the user knows them (DTensors where sharded).
        positions: Position of each parameter over all groups; seeds the rounding.
        params: Local shards.
        grads: Gradients, never written.
        exp_avgs: First moments m, in the format they are stored in.
        exp_avg_sqs: Second moments v.
        exp_dev_sqs: Noise variances s.
        steps: 0-dim step counts.
        dev_steps: 0-dim counts of the deviations in s.
    """

    owners: list[Tensor] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Moment] = field(default_factory=list)
    exp_avg_sqs: list[Moment] = field(default_factory=list)
    exp_dev_sqs: list[Moment] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    dev_steps: list[Tensor] = field(default_factory=list)

    def append(self, param: Tensor, grad: Tensor, position: int, state: dict[str, Tensor]) -> None:
        """Add one parameter with its gradient and states."""
        self.owners.append(param)
        self.positions.append(position)
        self.params.append(_local_real(param))
        self.grads.append(_local_real(grad))
        for moments, key in zip(self._moment_lists(), MOMENTS, strict=True):
            moments.append(moment_of(state, key))
        self.steps.append(state["step"])
        self.dev_steps.append(state["dev_step"])

    def split(self) -> list["GroupWork"]:
        """The same work by (device, dtype of the parameter), as foreach kernels need it.

        Parts hold at most `CHUNK_NUMEL` elements, or one larger parameter: foreach kernels make
        several temporaries of the size of the part.
        """
        parts: list[GroupWork] = []
        open_parts: dict[tuple[torch.device, torch.dtype], tuple[GroupWork, int]] = {}
        for i, param in enumerate(self.params):
            key = (param.device, param.dtype)
            part, size = open_parts.get(key, (None, 0))
            if part is None or size + param.numel() > CHUNK_NUMEL:
                part, size = GroupWork(), 0
                parts.append(part)
            part.extend_from(self, i)
            open_parts[key] = (part, size + param.numel())
        return parts

    def extend_from(self, other: "GroupWork", index: int) -> None:
        """Take over one parameter of another group's work."""
        for name in self.__slots__:
            getattr(self, name).append(getattr(other, name)[index])

    def write_back(
        self,
        index: int,
        param: Tensor,
        moments: tuple[Tensor, Tensor, Tensor],
        options: GroupOptions,
        keep: Tensor | None = None,
    ) -> None:
        """Round updated working copies into a low-precision parameter and its states.

        Args:
            index: Which parameter.
            param: Its updated values; the parameter itself needs nothing.
            moments: Updated exp_avg, exp_avg_sq, exp_dev_sq.
            options: For the rounding.
            keep: 0-dim, 0 where the step must leave no trace.
        """
        target = self.params[index]
        stored = [moments[index] for moments in self._moment_lists()]
        if param is target and all(moment.is_exact for moment in stored):
            return
        place = global_index(self.owners[index], target)
        key = rounding_key(
            self.steps[index].to(target.device), self.positions[index], options.rounding_seed
        )
        if param is not target:
            is_random = target.dtype == torch.bfloat16 and options.stochastic_rounding
            draw = uniform16(place, key, "param") if is_random else None
            round_to_bfloat16_(target, param, draw)
        for name, moment, values in zip(MOMENTS, stored, moments, strict=True):
            if not moment.is_exact:
                moment.write(values, uniform16(place, key, name), keep)

    def _moment_lists(self) -> tuple[list[Moment], list[Moment], list[Moment]]:
        return self.exp_avgs, self.exp_avg_sqs, self.exp_dev_sqs


def _local_real(tensor: Tensor) -> Tensor:
    # Unwrap first: the detach of a DTensor is dispatched in Python, that of its shard is not.
    tensor = local_tensor(tensor).detach()
    return torch.view_as_real(tensor) if torch.is_complex(tensor) else tensor

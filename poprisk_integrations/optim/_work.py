"""What a step works on: plain local tensors of one group, gathered once per step."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from poprisk_integrations.distributed import local_tensor

__all__ = ["GroupWork"]


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
        exp_avgs: First moments m.
        exp_avg_sqs: Second moments v.
        exp_dev_sqs: Noise variances s.
        steps: 0-dim step counts.
        dev_steps: 0-dim counts of the deviations in s.
    """

    owners: list[Tensor] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    exp_dev_sqs: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    dev_steps: list[Tensor] = field(default_factory=list)

    def append(self, param: Tensor, grad: Tensor, position: int, state: dict[str, Tensor]) -> None:
        """Add one parameter with its gradient and states."""
        self.owners.append(param)
        self.positions.append(position)
        self.params.append(_local_real(param))
        self.grads.append(_local_real(grad))
        self.exp_avgs.append(_local_real(state["exp_avg"]))
        self.exp_avg_sqs.append(_local_real(state["exp_avg_sq"]))
        self.exp_dev_sqs.append(_local_real(state["exp_dev_sq"]))
        self.steps.append(state["step"])
        self.dev_steps.append(state["dev_step"])

    def split(self) -> list["GroupWork"]:
        """The same work by (device, dtype of the parameter), as foreach kernels need it."""
        parts: dict[tuple[torch.device, torch.dtype], GroupWork] = {}
        for i, param in enumerate(self.params):
            part = parts.setdefault((param.device, param.dtype), GroupWork())
            for name in self.__slots__:
                getattr(part, name).append(getattr(self, name)[i])
        return list(parts.values())


def _local_real(tensor: Tensor) -> Tensor:
    tensor = local_tensor(tensor.detach())
    return torch.view_as_real(tensor) if torch.is_complex(tensor) else tensor

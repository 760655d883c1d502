"""Instead of ending a run at its full rate: back to its best weights, and to a rate of zero."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from poprisk_integrations.diagnostics.learning_rate_scaling import scale_learning_rates
from poprisk_integrations.distributed import local_tensor

__all__ = ["Cooldown", "KeptWeights", "signal_tail"]

_TAIL = 4  # of the steps so far it takes a quarter


class Cooldown:
    """Multiplies all rates of step i of k by 1 - i / (k + 1), on top of their schedules.

    Schedulers go on from what it sets (`scale_learning_rates`), and what they save says how far it
    has come: a resumed run needs the two numbers of `state_dict`.

    Example:
        >>> optimizer, cooldown = torch.optim.SGD([torch.zeros(1)], lr=1.0), Cooldown(3)
        >>> rates = []
        >>> while not cooldown.is_over:
        ...     cooldown.before_step([optimizer], [])
        ...     rates.append(round(optimizer.param_groups[0]["lr"], 2))
        >>> rates
        [0.75, 0.5, 0.25]
    """

    def __init__(self, steps: int, done: int = 0) -> None:
        if steps < 1:
            raise ValueError(f"Invalid steps: {steps}. Must be >= 1.")
        self.steps = steps
        self.done = done

    @property
    def is_over(self) -> bool:
        """Whether its last step has begun."""
        return self.done >= self.steps

    def before_step(self, optimizers: Iterable[Any], schedulers: Iterable[Any]) -> None:
        """Set the rates of the step to come; optimizers may be wrapped, schedulers None."""
        if not self.is_over:
            left = self.steps - self.done
            scale_learning_rates(optimizers, schedulers, left / (left + 1))
            self.done += 1

    def state_dict(self) -> dict[str, int]:
        """Plain numbers."""
        return {"steps": self.steps, "done": self.done}

    @classmethod
    def from_state(cls, state: Mapping[str, int]) -> "Cooldown":
        """The same again."""
        return cls(int(state["steps"]), int(state["done"]))


def signal_tail(step: int, left: float) -> int:
    """Steps of a cooldown after a stop by gradients, which knows no best window."""
    return int(max(1, min(step // _TAIL, left)))


class KeptWeights:
    """A copy in the host's memory of what a process holds of the trained weights and all buffers.

    Frozen parameters are left out, so of adapters it is small. Of sharded parameters (DTensors, the
    flat ones of FSDP1) each process keeps its shard. Not for optimizers that hold weights of their
    own beside the model's (DeepSpeed).
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._copies: dict[str, Tensor] = {}

    @property
    def is_empty(self) -> bool:
        """Whether nothing was kept yet."""
        return not self._copies

    @torch.no_grad()
    def keep(self) -> None:
        """Copy the present weights over the copy before."""
        for name, tensor in self._tensors():
            if name in self._copies and self._copies[name].shape == tensor.shape:
                self._copies[name].copy_(tensor)
            else:
                self._copies[name] = tensor.detach().to("cpu", copy=True)

    @torch.no_grad()
    def load(self) -> bool:
        """Put the copy back into the model, in place; whether there is one."""
        for name, tensor in self._tensors():
            if name in self._copies:
                tensor.copy_(self._copies[name])
        return not self.is_empty

    def state_dict(self) -> dict[str, Tensor]:
        """The copy of this process."""
        return dict(self._copies)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take a copy over."""
        self._copies = dict(state)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad:
                yield name, local_tensor(parameter)
        yield from self._model.named_buffers()

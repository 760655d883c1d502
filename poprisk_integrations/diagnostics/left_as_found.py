"""Training for a while, and then everything as it was: weights, optimizers, random numbers."""

import copy
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from poprisk_integrations.diagnostics.cooldown import KeptWeights
from poprisk_integrations.diagnostics.without_traces import randomness_kept

__all__ = ["LeftAsFound"]


class LeftAsFound:
    """What a training changes, so that it can be put back and another one start from the same.

    Trained parameters and all buffers are kept in the host's memory; of the states of optimizers
    and of the attributes of `owners` and of all modules a copy is kept, with the containers in them
    copied and the tensors in them cloned (counters, lists of a user's own, torchmetrics).

    Not put back: what a training does to other objects, to files, or to the data's own state.

    Args:
        model: The model as it is trained.
        optimizers: Of torch, wrapped or not; may be empty.
        owners: Objects whose attributes the training sets, such as a trainer.
        stateful: What has a `state_dict` of its own besides: a grad scaler.
        generators: Random numbers other than torch's default ones, such as a loader's.

    Example:
        >>> model = nn.Linear(1, 1)
        >>> found, before = LeftAsFound(model), model.weight.clone()
        >>> with found():
        ...     _ = nn.init.constant_(model.weight, torch.rand(1).item() + 5)
        >>> torch.equal(model.weight, before)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Iterable[Any] = (),
        owners: Iterable[Any] = (),
        stateful: Iterable[Any] = (),
        generators: Iterable[torch.Generator] = (),
    ) -> None:
        self._weights = KeptWeights(model)
        self._weights.keep()
        self._device = next((p.device for p in model.parameters()), None)
        self._optimizers = list(optimizers)
        # Loading an optimizer's state takes its tensors over: each time needs a copy of its own.
        self._states = [
            (thing, copy.deepcopy(thing.state_dict())) for thing in (*self._optimizers, *stateful)
        ]
        self._generators = [(generator, generator.get_state()) for generator in generators]
        self._objects: Sequence[Any] = [*owners, *model.modules()]
        self._shared = {id(buffer) for buffer in model.buffers()}

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Train inside; also after an error everything is put back."""
        attributes = [(thing, _copied(vars(thing), self._shared)) for thing in self._objects]
        with randomness_kept(self._device):
            try:
                yield
            finally:
                for thing, kept in attributes:
                    vars(thing).clear()
                    vars(thing).update(kept)
                self._weights.load()
                for thing, state in self._states:
                    thing.load_state_dict(copy.deepcopy(state))
                for optimizer in self._optimizers:
                    optimizer.zero_grad()
                for generator, numbers in self._generators:
                    generator.set_state(numbers)


def _copied(value: Any, shared: set[int]) -> Any:
    """Of plain containers and tensors a copy; whatever else is shared, buffers of modules too."""
    if type(value) is dict:
        return {key: _copied(part, shared) for key, part in value.items()}
    if type(value) is list:
        return [_copied(part, shared) for part in value]
    if type(value) in (set, deque) or isinstance(value, defaultdict):
        return copy.copy(value)
    if type(value) is Tensor and value.is_leaf and id(value) not in shared:
        return value.detach().clone().requires_grad_(value.requires_grad)
    return value

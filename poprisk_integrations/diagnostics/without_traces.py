"""A forward pass in training mode that leaves the model and all random numbers as they were."""

import random
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["WithoutTraces", "randomness_kept"]

_SMALL = 1 << 14  # elements up to which a buffer is kept without asking whether it changes


@contextmanager
def randomness_kept(device: torch.device | None = None) -> Iterator[None]:
    """Random numbers are as they were: torch's on the CPU and the device, Python's, NumPy's."""
    python, numpy = random.getstate(), sys.modules.get("numpy")
    of_numpy = None if numpy is None else numpy.random.get_state()
    is_plain = device is None or device.type in ("cpu", "meta")
    kind = "cuda" if device is None or is_plain else device.type
    with torch.random.fork_rng([] if is_plain else [device], device_type=kind):
        try:
            yield
        finally:
            random.setstate(python)
            if numpy is not None:
                numpy.random.set_state(of_numpy)


class WithoutTraces:
    """For the losses of examples that are not trained on at the moment.

    No graph is kept. Dropout is active as in training, with random numbers that no other part of
    the run will miss. Buffers
    (running statistics of normalisation layers, observers, codebooks) come back as they were, and
    so do metrics among the modules (torchmetrics). Large buffers that the first pass leaves alone
    (masks, tables of positions) are taken for constants from then on.

    Not undone: what the forward pass does to other objects, to files, or to loggers.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())
        >>> quiet, before = WithoutTraces(model), torch.get_rng_state()
        >>> with quiet():
        ...     out = model(torch.randn(3, 2))
        >>> out.requires_grad, model[0].running_mean.tolist(), torch.equal(
        ...     before, torch.get_rng_state()
        ... )
        (False, [0.0, 0.0], True)
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._steady: set[tuple[int, str]] = set()  # large buffers that the first pass left alone
        self._is_first = True

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Run a forward pass inside."""
        buffers = list(self._kept_buffers())
        metrics = [
            (metric, *_contents(metric)) for metric in filter(_is_metric, self._model.modules())
        ]
        try:
            with self.randomness(), torch.no_grad():
                yield
        finally:
            with torch.no_grad():
                for module, name, buffer, copy in buffers:
                    self._put_back(module, name, buffer, copy)
            for metric, attributes, states in metrics:
                vars(metric).update({**attributes, **states})
            self._is_first = False

    def randomness(self) -> AbstractContextManager[None]:
        """Only for random numbers: drawing and collating examples uses them too."""
        return randomness_kept(next((p.device for p in self._model.parameters()), None))

    def _kept_buffers(self) -> Iterator[tuple[nn.Module, str, Tensor, Tensor | None]]:
        for module in self._model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                is_steady = (id(module), name) in self._steady
                yield module, name, buffer, None if is_steady else buffer.clone()

    def _put_back(self, module: nn.Module, name: str, buffer: Tensor, copy: Tensor | None) -> None:
        if getattr(module, name, None) is not buffer:  # another tensor under the name
            setattr(module, name, buffer)
        if copy is None:
            return
        if self._is_first and buffer.numel() > _SMALL and torch.equal(buffer, copy):
            self._steady.add((id(module), name))
            return
        buffer.copy_(copy)


def _is_metric(module: nn.Module) -> bool:
    return any(cls.__name__ == "Metric" for cls in type(module).__mro__)


def _contents(metric: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """All attributes, and copies of what it has summed up, which may change in place."""
    state = metric.metric_state.items()
    return dict(vars(metric)), {
        k: v.clone() if isinstance(v, Tensor) else list(v) for k, v in state
    }

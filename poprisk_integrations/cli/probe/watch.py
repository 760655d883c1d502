"""Watches every torch optimizer of the process for some steps, then ends what is running."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from typing_extensions import Self

from poprisk_integrations.cli.probe.names import parameter_names
from poprisk_integrations.diagnostics.gradient_history import GradientHistory

__all__ = ["StepWatch", "WatchedOptimizer"]


class _Enough(BaseException):
    """Ends the watched training. Not an Exception: training loops catch those and go on."""


class WatchedOptimizer:
    """What was seen of one optimizer.

    Attributes:
        optimizer: The optimizer.
        params: Its trainable parameters at the first step.
        names: Their names in the model, where one was found.
        history: Their gradients; None if it trains nothing.
        steps: Its steps.
        betas: Of Adam; None for an optimizer without.
    """

    def __init__(self, optimizer: Optimizer, limit: int) -> None:
        self.optimizer = optimizer
        groups = optimizer.param_groups
        self.params = [p for group in groups for p in group["params"] if p.requires_grad]
        self.names = parameter_names(optimizer, self.params)
        self.history = GradientHistory(self.params, limit) if self.params else None
        self.steps = 0
        betas = next((g["betas"] for g in groups if g.get("betas") is not None), None)
        self.betas = None if betas is None else (float(betas[0]), float(betas[1]))

    def read(self) -> None:
        """Take in the present gradients."""
        if self.history is None:
            return
        # A fused optimizer unscales for GradScaler inside its step.
        scale = getattr(self.optimizer, "grad_scale", None)
        self.history.record(1.0 if scale is None else 1.0 / float(scale))


class StepWatch:
    """While it is active, reads the gradients of each `optimizer.step()` in this process.

    It goes by torch's public hooks, so it works in any loop, Trainer or LightningModule. Nothing
    is changed: no gradient, no weight, no random number. A step with a closure is read after the
    closure's first evaluation. Steps that an optimizer takes inside another one's count once.
    After `limit` steps of each optimizer that has stepped the training is ended: by an exception
    that leaves the `with` block and no further.

    Args:
        limit: Optimizer steps to watch.
        on_step: Called with the number of steps so far.

    Attributes:
        watched: What was seen, in the order of the first steps.
        seconds: Time from the end of the first step to that of the last.
        own_seconds: The watch's own part of it.

    Example:
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.SGD([p], lr=0.1)
        >>> with StepWatch(limit=3) as watch:
        ...     while True:
        ...         p.grad = torch.ones(2)
        ...         optimizer.step()
        >>> watch.watched[0].steps
        3
    """

    def __init__(self, limit: int, on_step: Callable[[int], None] | None = None) -> None:
        self.limit = limit
        self.watched: list[WatchedOptimizer] = []
        self.seconds = self.own_seconds = 0.0
        self._on_step = on_step
        self._handles: list[Any] = []
        self._stepping: Optimizer | None = None
        self._last: float | None = None
        self._own = 0.0

    def __enter__(self) -> Self:
        self._handles = [
            register_optimizer_step_pre_hook(self._before),
            register_optimizer_step_post_hook(self._after),
        ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        for handle in self._handles:
            handle.remove()
        return isinstance(error, _Enough)

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._stepping is not None and self._stepping is not optimizer:
            return None
        start = time.perf_counter()
        watched = self._find(optimizer)
        if watched.steps >= self.limit:  # another optimizer steps less often
            raise _Enough
        self._stepping = optimizer
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            watched.read()
        self._own += time.perf_counter() - start
        if closure is None:
            return None
        closure = self._reading(closure, watched)
        if len(args) > 1:
            return (args[0], closure, *args[2:]), kwargs
        return args, {**kwargs, "closure": closure}

    def _reading(self, closure: Callable[[], Any], watched: WatchedOptimizer) -> Callable[[], Any]:
        """The same closure, whose first evaluation is followed by a look at the gradients."""
        was_read = False

        def evaluate() -> Any:
            nonlocal was_read
            result = closure()
            if not was_read:
                was_read = True
                start = time.perf_counter()
                watched.read()
                self._own += time.perf_counter() - start
            return result

        return evaluate

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._stepping is not optimizer:
            return
        self._stepping = None
        watched = self._find(optimizer)
        watched.steps += 1
        now = time.perf_counter()
        if self._last is not None:
            self.seconds += now - self._last
            self.own_seconds += self._own
        self._last, self._own = now, 0.0
        if self._on_step is not None:
            self._on_step(max(w.steps for w in self.watched))
        if all(w.steps >= self.limit for w in self.watched):
            raise _Enough

    def _find(self, optimizer: Optimizer) -> WatchedOptimizer:
        for watched in self.watched:
            if watched.optimizer is optimizer:
                return watched
        with torch.no_grad():
            self.watched.append(WatchedOptimizer(optimizer, self.limit))
        return self.watched[-1]

"""Watches every torch optimizer of the process for some steps, then ends what is running."""

import gc
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from typing_extensions import Self

from poprisk_integrations.cli.errors import UsageError
from poprisk_integrations.diagnostics.probe import GradientHistory
from poprisk_integrations.diagnostics.rate_probe import RateProbe

__all__ = ["RateWatch", "StepWatch", "WatchedOptimizer"]

_UNNAMED = re.compile(r"group\d+\.param\d+")


class _Enough(BaseException):
    """Ends the watched training. Not an Exception: training loops catch those and go on."""


class WatchedOptimizer:
    """What was seen of one optimizer."""

    def __init__(self, optimizer: Optimizer, limit: int) -> None:
        self.optimizer = optimizer
        self.steps = 0
        groups = optimizer.param_groups
        self.params = [p for group in groups for p in group["params"] if p.requires_grad]
        self.names = parameter_names(optimizer, self.params)
        self.history = GradientHistory(self.params, limit) if self.params else None
        betas = next((g["betas"] for g in groups if g.get("betas") is not None), None)
        self.betas = None if betas is None else (float(betas[0]), float(betas[1]))  # of Adam

    def read(self) -> None:
        """Take in the present gradients."""
        if self.history is not None:
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
        self.watched: list[WatchedOptimizer] = []  # in the order of the first steps
        # From the end of the first step to that of the last, and the watch's own part of it.
        self.seconds = self.own_seconds = 0.0
        self._on_step = on_step
        self._handles: list[Any] = []
        self._stepping: Optimizer | None = None
        self._is_read = False  # whether the gradients of this step are
        self._last: float | None = None
        self._own = 0.0

    def __enter__(self) -> Self:
        self._handles = [
            register_optimizer_step_pre_hook(self._before),
            register_optimizer_step_post_hook(self._after),
        ]
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> bool:
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
        self._own += time.perf_counter() - start
        self._is_read = False
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._read(watched)
            return None

        def evaluate() -> Any:
            result = closure()
            if not self._is_read:  # a closure may be evaluated several times
                self._read(watched)
            return result

        if len(args) > 1:
            return (args[0], evaluate, *args[2:]), kwargs
        return args, {**kwargs, "closure": evaluate}

    def _read(self, watched: WatchedOptimizer) -> None:
        start = time.perf_counter()
        watched.read()
        self._is_read = True
        self._own += time.perf_counter() - start

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


class RateWatch:
    """While it is active, lets the training's optimizer step at the rates of a probe.

    Losses are what `backward` is called on; those that a GradScaler has multiplied count as they
    were before. The training ends, as under `StepWatch`, when the probe is over.

    Attributes:
        limit: Optimizer steps of the probe.
        watched: The optimizer, once it has stepped.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> probe = RateProbe(0.1, steps=20, score_batches=8)
        >>> with RateWatch(probe):
        ...     while True:
        ...         optimizer.zero_grad()
        ...         weight.square().sum().backward()
        ...         optimizer.step()
        >>> len(probe.losses()), probe.losses()[0], probe.losses()[-1] < 0.3
        (28, 1.0, True)
    """

    def __init__(self, probe: RateProbe) -> None:
        self.limit = probe.steps + probe.score_batches
        self.watched: list[Optimizer] = []
        self._probe = probe
        self._handles: list[Any] = []
        self._scaled: dict[int, tuple[Any, Tensor]] = {}  # by what a scaler has returned

    def __enter__(self) -> Self:
        self._backward, self._scale = torch.autograd.backward, torch.amp.GradScaler.scale
        self._handles = [
            register_optimizer_step_pre_hook(self._before),
            register_optimizer_step_post_hook(self._after),
        ]
        watch, backward, scale = self, self._backward, self._scale

        def seen(tensors: Any, *args: Any, **kwargs: Any) -> Any:
            watch._read(tensors)
            return backward(tensors, *args, **kwargs)

        def scaling(scaler: Any, outputs: Any) -> Any:
            scaled = scale(scaler, outputs)
            if isinstance(outputs, Tensor):
                watch._scaled = {id(scaled): (scaled, outputs)}
            return scaled

        torch.autograd.backward = seen
        torch.amp.GradScaler.scale = scaling  # type: ignore[assignment,method-assign]
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> bool:
        torch.autograd.backward = self._backward
        torch.amp.GradScaler.scale = self._scale  # type: ignore[method-assign]
        for handle in self._handles:
            handle.remove()
        return isinstance(error, _Enough)

    def _read(self, tensors: Any) -> None:
        roots = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        _, loss = self._scaled.get(id(roots[0]), (None, roots[0]))
        if len(roots) == 1 and loss.numel() == 1:
            self._probe.add(loss)

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self.watched:
            self.watched.append(optimizer)
        if self.watched[0] is not optimizer:
            names = f"{type(self.watched[0]).__name__} and {type(optimizer).__name__}"
            raise UsageError(
                f"the training steps two optimizers ({names}), and a search sets one rate"
            )
        self._probe.before_step(optimizer)

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._probe.after_step()
        if self._probe.is_over:
            raise _Enough


def parameter_names(optimizer: Optimizer, params: Sequence[Tensor]) -> list[str]:
    """Names in the model that the parameters belong to; "group0.param3" for want of one.

    The optimizer's own names (torch >= 2.6, if it was given named parameters), else those of the
    modules in this process, outermost first.

    Example:
        >>> from torch.optim import SGD
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> parameter_names(SGD(model.parameters(), lr=0.1), list(model.parameters()))
        ['0.weight', '0.bias']
    """
    found: dict[int, str] = {}
    for number, group in enumerate(optimizer.param_groups):
        given = group.get("param_names") or []
        for place, param in enumerate(group["params"]):
            named = place < len(given)
            found[id(param)] = given[place] if named else f"group{number}.param{place}"
    unnamed = {id(p) for p in params if _UNNAMED.fullmatch(found[id(p)])}
    for root in _modules_with(unnamed) if unnamed else ():
        for name, param in root.named_parameters():
            if id(param) in unnamed:
                found[id(param)] = name
                unnamed.discard(id(param))
    return [found[id(p)] for p in params]


def _modules_with(wanted: set[int]) -> list[nn.Module]:
    """Modules that hold any of these parameters and are inside no other one, the largest first."""
    # By the type: `isinstance` asks lazy proxies for their class, which may import something.
    modules = [m for m in gc.get_objects() if issubclass(type(m), nn.Module)]
    held = [(len(wanted & set(map(id, m.parameters()))), m) for m in modules]
    holders = [(size, m) for size, m in held if size]
    inside = {id(child) for _, m in holders for child in m.modules() if child is not m}
    roots = [(size, m) for size, m in holders if id(m) not in inside]
    return [m for _, m in sorted(roots, key=lambda root: -root[0])]

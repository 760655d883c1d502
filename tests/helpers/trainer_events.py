"""Trainer's event sequence around one optimizer, driven by hand."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

__all__ = ["EventSequence"]


class EventSequence:
    """Calls a callback as Trainer does, one optimizer step at a time.

    The optimizer's parameters hold their gradients already when `step` is called; `kwargs` are
    further keyword arguments of every event.
    """

    def __init__(
        self,
        callback: TrainerCallback,
        optimizer: Any,
        args: TrainingArguments,
        max_steps: int = 100,
        **kwargs: Any,
    ) -> None:
        self.callback, self.optimizer = callback, optimizer
        self.args, self.kwargs = args, kwargs
        stateful = [callback] if isinstance(callback, ExportableState) else []
        self.state = TrainerState(max_steps=max_steps, stateful_callbacks=stateful)
        self.control = TrainerControl()
        self.event("on_train_begin")

    def event(self, name: str) -> None:
        """Call one event."""
        handler = getattr(self.callback, name)
        handler(self.args, self.state, self.control, optimizer=self.optimizer, **self.kwargs)

    def step(self) -> None:
        """Call the events of an optimizer step, and make it."""
        self.event("on_step_begin")
        self.event("on_pre_optimizer_step")
        self.optimizer.step()
        self.event("on_optimizer_step")
        self.state.global_step += 1
        self.event("on_step_end")

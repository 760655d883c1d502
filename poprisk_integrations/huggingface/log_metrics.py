"""Callbacks whose numbers Trainer logs, and that a trainer of ours may tell something."""

from collections.abc import Iterable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["MetricsCallback", "add_metrics", "log_now"]


class MetricsCallback(TrainerCallback):
    """A callback with numbers for Trainer's log lines.

    Trackers are called before users' callbacks, so numbers added in `on_log` would not reach
    them: `registration.register` has them added before the first callback is called.
    """

    def metrics(self) -> dict[str, float]:
        """The present values."""
        raise NotImplementedError

    def grad_norm(self, norm: Any) -> None:
        """Take the norm of the gradients before clipping, from `PopRiskTrainerMixin`.

        Args:
            norm: As Trainer computes it.
        """


def add_metrics(
    callbacks: Iterable[TrainerCallback], logs: dict[str, Any] | None, state: TrainerState
) -> None:
    """Put the numbers of our callbacks into a training log line and `state.log_history`.

    Lines of an evaluation stay as they are.

    Args:
        callbacks: All callbacks of a run.
        logs: What Trainer logs, changed in place.
        state: Trainer's state, whose last history entry is this line.
    """
    if logs is None or not ("loss" in logs or "train_loss" in logs):
        return
    metrics: dict[str, float] = {}
    for callback in callbacks:
        if isinstance(callback, MetricsCallback):
            metrics.update(callback.metrics())
    logs.update(metrics)
    if state.log_history and state.log_history[-1].get("step") == state.global_step:
        state.log_history[-1].update(metrics)


def log_now(args: TrainingArguments, control: TrainerControl) -> None:
    """Have Trainer log at the end of this step, unless the user switched logging off."""
    if str(getattr(args.logging_strategy, "value", args.logging_strategy)) != "no":
        control.should_log = True

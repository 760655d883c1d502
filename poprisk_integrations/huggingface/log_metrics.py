"""Callbacks whose numbers Trainer logs, and that a trainer of ours may tell something."""

from collections.abc import Iterable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from poprisk_integrations.core.noise_rate import WIDEST

__all__ = ["MetricsCallback", "add_metrics", "for_the_console", "log_now"]

# The most telling first: a console line shows three.
_ON_THE_CONSOLE = (
    "signal_ratio",
    "predicted_stop_step",
    "noise_rate",
    "reward_accuracy",
    "open_fraction",
    "lr_cuts",
)


class MetricsCallback(TrainerCallback):
    """A callback with numbers for Trainer's log lines.

    Trackers are called before users' callbacks, so numbers added in `on_log` would not reach
    them: `registration.register` has them added before the first callback is called.
    """

    def metrics(self) -> dict[str, float]:
        """The present values."""
        raise NotImplementedError

    def grad_norm(self, norm: Any) -> None:
        """Take the norm of the gradients before clipping, right after it was done.

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
            metrics.update(callback.metrics() or {})  # None from one that was switched off
    logs.update(metrics)
    if state.log_history and state.log_history[-1].get("step") == state.global_step:
        state.log_history[-1].update(metrics)


def for_the_console(logs: dict[str, Any] | None) -> dict[str, Any] | None:
    """A line for people: a copy with at most three of our numbers.

    Args:
        logs: With all numbers, as trackers get them.

    Example:
        >>> for_the_console({"loss": 0.3, "poprisk/signal_ratio": 1.5, "poprisk/agreement_se": 0.1})
        {'loss': 0.3, 'poprisk/signal_ratio': 1.5}
    """
    if logs is None or not any(str(key).startswith("poprisk/") for key in logs):
        return logs
    low, high = (logs.get(f"poprisk/noise_rate_{end}", 0.0) for end in ("low", "high"))
    hidden = "noise_rate" if high - low > WIDEST else ""  # a rate that the margins do not tell
    names = [name for name in _ON_THE_CONSOLE if name != hidden and f"poprisk/{name}" in logs]
    shown = [f"poprisk/{name}" for name in names[:3]]
    return {k: v for k, v in logs.items() if k in shown or not str(k).startswith("poprisk/")}


def log_now(args: TrainingArguments, control: TrainerControl) -> None:
    """Have Trainer log at the end of this step, unless the user switched logging off."""
    if str(getattr(args.logging_strategy, "value", args.logging_strategy)) != "no":
        control.should_log = True

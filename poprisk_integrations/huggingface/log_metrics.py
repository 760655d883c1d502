"""Adds numbers to the line that Trainer is logging."""

from typing import Any

from transformers import TrainerState

__all__ = ["add_to_log"]


def add_to_log(metrics: dict[str, float], logs: dict[str, Any] | None, state: TrainerState) -> None:
    """Put metrics into a training log line, for callbacks to come and for `state.log_history`.

    Trackers come before users' callbacks, so they have seen the line already; with
    `PopRiskTrainerMixin` the numbers are there before them. Lines of an evaluation stay as they
    are.

    Args:
        metrics: Numbers to add.
        logs: What Trainer logs, changed in place.
        state: Trainer's state, whose last history entry is this line.
    """
    if logs is None or not ("loss" in logs or "train_loss" in logs):
        return
    logs.update(metrics)
    if state.log_history and state.log_history[-1].get("step") == state.global_step:
        state.log_history[-1].update(metrics)

"""Checks of the arguments that all callbacks with windows have."""

from typing import Any

from poprisk_integrations.diagnostics import SHORTEST_WINDOW

__all__ = ["check_window_arguments"]

ACCUMULATORS = ("auto", "exact", "sample")


def check_window_arguments(window: Any, accumulator: Any, epoch_steps: Any) -> None:
    """Refuse values outside their range.

    Args:
        window: "auto", "third" or an integer >= 4.
        accumulator: "auto", "exact" or "sample".
        epoch_steps: None or an integer >= 1.

    Raises:
        ValueError: Naming argument, value and allowed values.
    """
    named = window in ("auto", "third")
    if not named and (type(window) is not int or window < SHORTEST_WINDOW):
        raise ValueError(
            f"Invalid window: {window!r}. Must be 'auto' or an integer >= {SHORTEST_WINDOW}."
        )
    if accumulator not in ACCUMULATORS:
        raise ValueError(f"Invalid accumulator: {accumulator!r}. Must be one of {ACCUMULATORS}.")
    if epoch_steps is not None and (type(epoch_steps) is not int or epoch_steps < 1):
        raise ValueError(f"Invalid epoch_steps: {epoch_steps!r}. Must be None or an integer >= 1.")

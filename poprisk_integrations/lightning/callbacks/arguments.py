"""Checks of arguments that several callbacks share."""

from collections.abc import Sequence
from typing import Any

from poprisk_integrations.diagnostics import SHORTEST_WINDOW

__all__ = ["check_choice", "check_epoch_steps", "check_window"]


def check_window(window: Any) -> None:
    """Refuse what is neither "auto" nor a length.

    Raises:
        ValueError: Naming the value and the allowed ones.
    """
    if window != "auto" and (type(window) is not int or window < SHORTEST_WINDOW):
        raise ValueError(
            f"Invalid window: {window!r}. Must be 'auto' or an integer >= {SHORTEST_WINDOW}."
        )


def check_epoch_steps(epoch_steps: Any) -> None:
    """Refuse what is neither None nor a length.

    Raises:
        ValueError: Naming the value and the allowed ones.
    """
    if epoch_steps is not None and (type(epoch_steps) is not int or epoch_steps < 1):
        raise ValueError(f"Invalid epoch_steps: {epoch_steps!r}. Must be None or an integer >= 1.")


def check_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Refuse a value that is not on the list.

    Raises:
        ValueError: Naming the argument, the value and the allowed ones.
    """
    if value not in allowed:
        raise ValueError(f"Invalid {name}: {value!r}. Must be one of {allowed}.")

"""A callback's numbers in `trainer_state.json`, found again even if Trainer leaves them."""

from typing import Any

from transformers import TrainerState
from transformers.trainer_callback import ExportableState

__all__ = ["add_exported_state", "find_exported_state"]


def find_exported_state(state: TrainerState, callback: ExportableState) -> dict[str, Any] | None:
    """Attributes that a callback exported into the checkpoint; None if it was not there.

    Trainer itself restores them only with `restore_callback_states_from_checkpoint=True`.

    Args:
        state: Trainer's state, as loaded from the checkpoint.
        callback: A callback. Of several of its class, the one with the same arguments is taken.
    """
    exported: Any = state.stateful_callbacks
    entry = exported.get(type(callback).__name__) or []
    entries = entry if isinstance(entry, list) else [entry]
    same = [e for e in entries if e["args"] == callback.state()["args"]] or entries
    return same[-1]["attributes"] if same else None


def add_exported_state(state: TrainerState, callback: ExportableState) -> None:
    """Enter a callback that the checkpoint does not know: Trainer's next save fails without it."""
    exported: Any = state.stateful_callbacks
    exported.setdefault(type(callback).__name__, callback.state())

"""A callback's numbers in `trainer_state.json`, found again even if Trainer leaves them."""

from typing import Any

from transformers import TrainerState
from transformers.trainer_callback import ExportableState

__all__ = ["add_exported_state", "find_exported_state", "forget_older_exports", "place_in_run"]

_PLACES = "poprisk_places"


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


def forget_older_exports(state: TrainerState, callback: ExportableState) -> None:
    """After a save: of two callbacks of a class Trainer would add to a growing list."""
    exported: Any = state.stateful_callbacks
    if isinstance(exported.get(type(callback).__name__), list):
        exported[type(callback).__name__] = []


def place_in_run(state: TrainerState, kind: str) -> int:
    """How many of a kind have asked in this run, this one included: 1 for the first.

    Args:
        state: Trainer's state, one object per run.
        kind: Any name.
    """
    places: dict[str, int] = state.__dict__.setdefault(_PLACES, {})  # no field: never saved
    places[kind] = places.get(kind, 0) + 1
    return places[kind]

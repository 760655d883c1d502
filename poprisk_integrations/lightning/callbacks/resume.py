"""A resumed run's own state in a checkpoint, and what is different from the run that wrote it."""

from collections.abc import Mapping, Sequence
from typing import Any

from poprisk_integrations.lightning.callbacks.run_plan import setup_changes
from poprisk_integrations.lightning.callbacks.step_feed import StepFeed

__all__ = ["find_state", "resume_feed"]


def find_state(
    checkpoint: Mapping[str, Any], own_key: str, all_keys: Sequence[str]
) -> dict[str, Any] | None:
    """State of a callback that had other arguments when the checkpoint was written.

    Args:
        checkpoint: Lightning's.
        own_key: `state_key` of the callback, which the checkpoint lacks.
        all_keys: Those of all callbacks of the trainer.

    Returns:
        The one state of a callback of this class that no other callback claims; None if there is
        none or more than one.
    """
    prefix = own_key[: own_key.index("(") + 1]
    states = checkpoint.get("callbacks") or {}
    left = [key for key in states if str(key).startswith(prefix) and key not in all_keys]
    return states[left[0]] if len(left) == 1 else None


def resume_feed(
    feed: StepFeed,
    state: Mapping[str, Any],
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    settings: Sequence[str],
) -> str | None:
    """Continue a checkpoint's window, if it is of the same kind as the coming ones.

    Args:
        feed: New.
        state: `StepFeed.state_dict` of the run that wrote the checkpoint.
        before: That run's setup.
        now: This run's.
        settings: Names in the setup on which no window depends.

    Returns:
        What to warn of; None if the run continues as if it had never been interrupted.
    """
    changes = setup_changes(before, now)
    kinds = {k: v for k, v in now.items() if k not in settings}
    keep_window = not setup_changes(before, kinds)
    lost = feed.load_state_dict(dict(state), keep_window=keep_window)
    if changes:
        window = "." if keep_window else "; the unfinished window starts afresh."
        return f"resumed with {', '.join(changes)}. What was counted so far is kept{window}"
    if lost is not None:
        return f"{lost}. An unfinished window starts afresh, so the stop may come at another step."
    return None

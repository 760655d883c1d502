"""Whether the saved state of a window can be continued, and by which tensors."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from poprisk_integrations.diagnostics.window_layout import WindowLayout

__all__ = ["check_state", "copy_state", "state_misfit", "window_fits"]

KEYS = {
    "accumulator",
    "seen",
    "counted",
    "sums",
    "squares",
    "norm_sq",
    "previous",
    "products",
    "last_grads",
    "agreements",
}


def check_state(state_dict: Mapping[str, Any]) -> None:
    """Refuse what is no state of this version.

    Raises:
        ValueError: If an entry is missing.
    """
    missing = sorted(KEYS - set(state_dict))
    if missing:
        raise ValueError(f"Invalid state of a window: it lacks {', '.join(missing)}.")


def copy_state(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The same entries in tensors of their own."""
    return {
        key: copy_state(value)
        if isinstance(value, Mapping)
        else value.clone()
        if isinstance(value, Tensor)
        else value
        for key, value in state_dict.items()
    }


def state_misfit(state_dict: Mapping[str, Any], layout: WindowLayout) -> str | None:
    """Why a state does not belong to these tensors; None if it does."""
    saved, columns = state_dict["accumulator"], len(layout.locals)
    if saved not in ("auto", layout.accumulator):
        return f"it is of accumulator={saved!r}, the window has {layout.accumulator!r}"
    norm_sq = state_dict["norm_sq"]
    if norm_sq is not None and norm_sq.shape[1] != columns:
        return f"it is of {norm_sq.shape[1]} tensors, here are {columns}"
    sampled = [(count,) for count in layout.sample.counts]
    whole = [tuple(t.shape) for t in layout.locals]
    summed = whole if layout.accumulator == "exact" else sampled
    shapes = {"sums": summed, "squares": summed, "previous": sampled, "last_grads": sampled}
    for key, expected in shapes.items():
        for position, tensor in state_dict[key].items():
            found = tuple(tensor.shape)
            if int(position) >= columns:
                return f"it has a tensor {position}, here are {columns}"
            if found != expected[int(position)]:
                return f"tensor {position} of {key} is {found}, not {expected[int(position)]}"
    if len(state_dict["previous"]) not in (0, columns):
        return f"it is of {len(state_dict['previous'])} tensors, here are {columns}"
    return None


def window_fits(
    state_dict: Mapping[str, Any], params: Iterable[Tensor], shard_group: Any = None
) -> bool:
    """Whether a window's state belongs to parameters of these shapes.

    Args:
        state_dict: From `GradientWindow.state_dict`.
        params: The parameters; those that require no gradient are passed over.
        shard_group: As in `GradientWindow`; all of its ranks must call.
    """
    tensors = [p for p in params if p.requires_grad]
    if KEYS - set(state_dict):
        return False
    if not tensors:
        return not state_dict["sums"]
    layout = WindowLayout(tensors, state_dict["accumulator"], shard_group)
    return state_misfit(state_dict, layout) is None

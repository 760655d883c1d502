"""The unfinished window in a checkpoint: tensors in safetensors, beside Trainer's own files."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from poprisk_integrations._files import write_whole
from poprisk_integrations.diagnostics import GradientWindow, window_fits
from poprisk_integrations.distributed import mean_over_ranks

__all__ = ["WINDOW_FILE", "all_ranks_have", "load_window", "save_window"]

WINDOW_FILE = "poprisk_window.safetensors"
_BY_POSITION = ("sums", "squares", "previous", "last_grads")


def save_window(window: GradientWindow, directory: str, step: int, name: str = WINDOW_FILE) -> None:
    """Write the unfinished window; a file of this name is either whole or absent.

    Args:
        window: The window.
        directory: The checkpoint's directory.
        step: Optimizer steps so far.
        name: Of the file.
    """
    state = window.state_dict()
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    for key in _BY_POSITION:
        tensors |= {f"{key}.{i}": t for i, t in state[key].items()}
    metadata = {"accumulator": state["accumulator"], "seen": str(state["seen"]), "step": str(step)}
    with write_whole(os.path.join(directory, name)) as temporary:
        contiguous = {name: t.contiguous() for name, t in tensors.items()}
        save_file(contiguous, str(temporary), metadata=metadata)


def load_window(
    directory: str, step: int, params: Sequence[Tensor], name: str = WINDOW_FILE
) -> dict[str, Any] | None:
    """State for `GradientWindow.load_state_dict`, or None if there is none that fits.

    Args:
        directory: The checkpoint's directory.
        step: Optimizer steps of the checkpoint.
        params: The optimizer's parameters: shapes must match.
        name: Of the file.

    Raises:
        ValueError: If the file is there but damaged; the message names it.
    """
    path = os.path.join(directory, name)
    if not os.path.isfile(path):
        return None
    try:
        metadata, tensors = _read(path)
        if metadata.get("step") != str(step):
            return None
        state = _state_of(metadata, tensors)
        return state if window_fits(state, params) else None
    except (OSError, SafetensorError, ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{path!r} is damaged ({' '.join(str(error).split())}). Resume from another "
            "checkpoint, or delete the file: the unfinished window then starts afresh."
        ) from error


def _read(path: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not iterable)
        return file.metadata() or {}, tensors


def _state_of(metadata: dict[str, str], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What `save_window` was given."""
    state: dict[str, Any] = {
        "accumulator": metadata.get("accumulator"),
        "seen": int(metadata["seen"]),
        **dict.fromkeys(("counted", "norm_sq", "products", "agreements")),
        **{key: {} for key in _BY_POSITION},
    }
    for entry, tensor in tensors.items():
        key, _, position = entry.partition(".")
        if position:
            state.setdefault(key, {})[position] = tensor
        else:
            state[key] = tensor
    return state


def all_ranks_have(state: dict[str, Any] | None, device: Any) -> bool:
    """Whether every rank found a window: if one has none all start afresh, to close together.

    Args:
        state: From `load_window`.
        device: Of the ranks' communication.
    """
    return float(mean_over_ranks(torch.tensor(float(state is not None), device=device))) == 1.0

"""The unfinished window in a checkpoint: tensors in safetensors, beside Trainer's own files."""

import os
from collections.abc import Sequence
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from poprisk_integrations.diagnostics import GradientWindow

__all__ = ["WINDOW_FILE", "load_window", "save_window"]

WINDOW_FILE = "poprisk_window.safetensors"


def save_window(window: GradientWindow, directory: str, step: int) -> None:
    """Write the unfinished window; a file of this name is either whole or absent.

    Args:
        window: The window.
        directory: The checkpoint's directory.
        step: Optimizer steps so far.
    """
    state = window.state_dict()
    tensors = {f"sums.{i}": t for i, t in state["sums"].items()}
    tensors |= {f"sq.{i}": t for i, t in state["sq"].items()}
    if state["counted"] is not None:
        tensors["counted"] = state["counted"]
    path = os.path.join(directory, WINDOW_FILE)
    save_file(
        {name: t.contiguous() for name, t in tensors.items()},
        f"{path}.tmp",
        metadata={"seen": str(state["seen"]), "step": str(step)},
    )
    os.replace(f"{path}.tmp", path)


def load_window(directory: str, step: int, params: Sequence[Tensor]) -> dict[str, Any] | None:
    """State for `GradientWindow.load_state_dict`, or None if there is none that fits.

    Args:
        directory: The checkpoint's directory.
        step: Optimizer steps of the checkpoint.
        params: The optimizer's parameters: shapes must match, and tensors go to their devices.
    """
    path = os.path.join(directory, WINDOW_FILE)
    if not os.path.isfile(path):
        return None
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not iterable)
    if metadata.get("step") != str(step):
        return None
    trained = [p for p in params if p.requires_grad]
    state: dict[str, Any] = {"seen": int(metadata["seen"]), "sums": {}, "sq": {}, "counted": None}
    for name, tensor in tensors.items():
        kind, _, position = name.partition(".")
        if kind == "counted":
            state["counted"] = _to_device_of(trained, tensor)
            continue
        if int(position) >= len(trained):
            return None
        param = trained[int(position)]
        if kind == "sums" and tensor.shape != param.shape:
            return None
        state[kind][position] = tensor.to(param.device)
    return state


def _to_device_of(params: Sequence[Tensor], tensor: Tensor) -> Tensor:
    return tensor.to(params[0].device) if params else tensor

"""The state of one parameter: made when first needed, fitted to what its parameter has become."""

from typing import Any

import torch
from torch import Tensor

from poprisk_integrations.distributed import local_tensor
from poprisk_integrations.optim._checkpoint import COUNTS, restored_moment
from poprisk_integrations.optim._moments import (
    MOMENTS,
    WIDE_DTYPES,
    moment_format,
    new_moment,
    state_keys,
)
from poprisk_integrations.optim._triton_tables import is_capturing

__all__ = ["fit_state"]


def fit_state(
    state: dict[str, Any], param: Tensor, state_dtype: Any, *, counts_on_device: bool
) -> None:
    """Complete a parameter's state, key by key: a loaded AdamW state has all but the noise.

    Parameters are moved, converted and resized behind an optimizer. Moments follow to another
    device and to a wider dtype. A noise variance of another shape starts anew, since those who
    resize a parameter know Adam's moments only; of exp_avg and exp_avg_sq that is an error, because
    compiled paths take the shape from the parameter.

    Args:
        state: Changed in place.
        param: The parameter.
        state_dtype: The group's option.
        counts_on_device: Whether the counts live on the parameter's device.

    Raises:
        RuntimeError: If a moment has another shape than the parameter, or while a CUDA graph is
            captured and states are missing.
    """
    shape, device, dtype = param.shape, param.device, param.dtype
    count_device = local_tensor(param).device if counts_on_device else torch.device("cpu")
    if not state.keys() >= _COUNTS:
        if is_capturing(device):
            raise RuntimeError(
                "PopRiskAdamW has no state for a parameter while a CUDA graph is captured: each "
                "replay would start it anew. Run a step, or init_state(), before the capture."
            )
        if "step" in state:
            # Set by others past load_state_dict: DeepSpeed's universal checkpoint gives ONE step
            # tensor, wherever it lies, to all parameters, and each of them would count on it.
            step = torch.as_tensor(state["step"], dtype=torch.float32, device=count_device)
            state["step"] = step.detach().clone().reshape(())
        for key in COUNTS:
            if key not in state:
                state[key] = torch.zeros((), dtype=torch.float32, device=count_device)
    for key in MOMENTS:
        held = state.get(key)
        if held is None:
            held = state.get(state_keys(key, "8bit")[0])
        if held is None:
            state.update(new_moment(param, key, moment_format(param, key, state_dtype)))
        elif held.shape != shape:
            _restart_noise(state, key, param, state_dtype)
        elif held.device != device or (held.dtype != dtype and dtype in WIDE_DTYPES):
            moved = restored_moment(state, key, moment_format(param, key, state_dtype), param)
            _drop(state, key)
            state.update(moved)
            for name in COUNTS:
                state[name] = state[name].to(count_device)


_COUNTS = set(COUNTS)


def _restart_noise(state: dict[str, Any], key: str, param: Tensor, state_dtype: Any) -> None:
    if key != "exp_dev_sq":
        held = state.get(key, state.get(state_keys(key, "8bit")[0]))
        raise RuntimeError(
            f"PopRiskAdamW: {key} has the shape {tuple(held.shape)}, its parameter "  # type: ignore[union-attr]
            f"{tuple(param.shape)}. Whoever resizes a parameter must resize its exp_avg and "
            "exp_avg_sq too, or remove its state; exp_dev_sq starts anew by itself."
        )
    _drop(state, key)
    state["dev_step"] = torch.zeros_like(state["dev_step"])
    state.update(new_moment(param, key, moment_format(param, key, state_dtype)))


def _drop(state: dict[str, Any], key: str) -> None:
    for name in (key, *state_keys(key, "8bit")):
        state.pop(name, None)

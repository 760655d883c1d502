"""Optimizer checkpoints in: our own, AdamW's, and refusals for everything else."""

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from poprisk_integrations.optim._options import check_group, state_dtype_of

__all__ = ["adopt_group_options", "check_foreign_state", "restore_state_dtypes"]

MOMENTS = ("exp_avg", "exp_avg_sq")
TENSORS = (*MOMENTS, "exp_dev_sq")
COUNTS = ("step", "dev_step")
# How a step is computed belongs to the process, not to the trajectory.
IMPLEMENTATION = ("foreach", "fused", "capturable", "collect_stats_every", "noise_source")


def check_foreign_state(groups: list[dict[str, Any]], state_dict: dict[str, Any]) -> None:
    """Refuse the state of another optimizer before anything is loaded.

    Raises:
        ValueError: Naming what was found and what is needed.
    """
    saved_ids = chain.from_iterable(g["params"] for g in state_dict["param_groups"])
    params = chain.from_iterable(g["params"] for g in groups)
    owner = dict(zip(saved_ids, params))  # noqa: B905 - torch reports unequal lengths itself
    for index, state in state_dict["state"].items():
        if index not in owner or not state:
            continue
        missing = [key for key in ("step", *MOMENTS) if key not in state]
        if missing:
            raise ValueError(
                f"Not a PopRiskAdamW or AdamW checkpoint: parameter {index} has the state keys "
                f"{sorted(state)}, without {missing}."
            )
        for key in TENSORS:
            value = state.get(key)
            if value is not None and tuple(value.shape) != tuple(owner[index].shape):
                raise ValueError(
                    f"Checkpoint does not fit: {key} of parameter {index} has the shape "
                    f"{tuple(value.shape)}, the parameter {tuple(owner[index].shape)}."
                )
    for group in state_dict["param_groups"]:
        if group.get("amsgrad"):
            raise ValueError(
                "Invalid amsgrad in the checkpoint: True. PopRiskAdamW has no amsgrad."
            )


def adopt_group_options(
    groups: list[dict[str, Any]], before: list[dict[str, Any]], saved: list[dict[str, Any]]
) -> None:
    """Keep present options that the checkpoint lacks, and the present implementation flags.

    Args:
        groups: The groups after loading, changed in place.
        before: Their options before.
        saved: The checkpoint's groups.

    Raises:
        ValueError: If the checkpoint brought a value that cannot be.
    """
    for group, present, loaded in zip(groups, before, saved, strict=True):
        for name, value in present.items():
            if name in IMPLEMENTATION or name not in loaded:
                group[name] = value
        check_group(group)


def restore_state_dtypes(
    optimizer: Optimizer,
    state_dict: dict[str, Any],
    on_device: Callable[[Tensor, dict[str, Any]], bool],
) -> None:
    """Undo torch's cast of every state to the parameter's dtype.

    `Optimizer.load_state_dict` casts all floating-point states but `step` to the dtype of the
    parameter, which rounds the float32 states of a bfloat16 parameter and turns counts above
    256 into other numbers.

    Args:
        optimizer: Freshly loaded.
        state_dict: What it was loaded from, after all pre-hooks.
        on_device: Whether a parameter's counts live on its device.
    """
    for group, saved_group in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        for param, index in zip(group["params"], saved_group["params"], strict=True):
            saved, state = state_dict["state"].get(index), optimizer.state.get(param)
            if not saved or not state:
                continue
            for key in [key for key in state if key not in TENSORS + COUNTS]:
                del state[key]
            for key in TENSORS:
                if key in saved:
                    state[key] = _like_state(saved[key], state[key], param)
            device = param.device if on_device(param, group) else torch.device("cpu")
            for key in COUNTS:
                if key in saved:
                    count = torch.as_tensor(saved[key], dtype=torch.float32)
                    state[key] = count.detach().clone().reshape(()).to(device)


def _like_state(saved: Tensor, loaded: Tensor, param: Tensor) -> Tensor:
    dtype = state_dtype_of(param)
    if loaded.dtype == dtype and saved.dtype == dtype:
        return loaded
    # A copy, as torch makes by casting: the caller's dictionary must not be trained on.
    return saved.detach().to(device=param.device, dtype=dtype, copy=True)

"""Optimizer checkpoints in: our own, AdamW's, and refusals for everything else."""

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from poprisk_integrations.distributed import is_dtensor
from poprisk_integrations.optim._moments import (
    MOMENTS,
    moment_format,
    moment_of,
    new_moment,
    scale_shape,
    state_keys,
)
from poprisk_integrations.optim._options import check_group

__all__ = ["adopt_group_options", "check_foreign_state", "restore_states", "restored_moment"]

COUNTS = ("step", "dev_step")
_OURS = {*COUNTS, *MOMENTS, *chain.from_iterable(state_keys(key, "8bit") for key in MOMENTS)}
# How a step is computed, and how states are stored, belongs to the process, not to the trajectory.
IMPLEMENTATION = (
    "foreach",
    "fused",
    "capturable",
    "collect_stats_every",
    "noise_source",
    "state_dtype",
)


def check_foreign_state(groups: list[dict[str, Any]], state_dict: dict[str, Any]) -> None:
    """Refuse the state of another optimizer before anything is loaded.

    Raises:
        ValueError: Naming what was found and what is needed.
    """
    saved_ids = chain.from_iterable(g["params"] for g in state_dict["param_groups"])
    params = chain.from_iterable(g["params"] for g in groups)
    owner = dict(zip(saved_ids, params))  # noqa: B905 - torch reports unequal lengths itself
    for group in state_dict["param_groups"]:
        if group.get("amsgrad"):
            raise ValueError(
                "Invalid amsgrad in the checkpoint: True. PopRiskAdamW has no amsgrad."
            )
    for index, state in state_dict["state"].items():
        if index in owner and state:
            _check_parameter_state(index, state, owner[index])
    for group, saved in zip(groups, state_dict["param_groups"]):  # noqa: B905 - as above
        check_group({**saved, **_kept(group, saved)})


def _check_parameter_state(index: Any, state: dict[str, Any], param: Tensor) -> None:
    kinds = {key: _saved_kind(state, key) for key in MOMENTS}
    missing = [key for key in MOMENTS[:2] if kinds[key] is None]
    if "step" not in state:
        missing.insert(0, "step")
    if missing:
        raise ValueError(
            f"Not a PopRiskAdamW or AdamW checkpoint: parameter {index} has the state keys "
            f"{sorted(state)}, without {missing}."
        )
    known = {name for key, kind in kinds.items() if kind for name in state_keys(key, kind)}
    extra = sorted(set(state) - known - set(COUNTS))
    # In our own, wrappers of the optimizer (Lookahead) keep tensors of theirs.
    if extra and "dev_step" not in state:
        raise ValueError(
            f"Not a PopRiskAdamW or AdamW checkpoint: parameter {index} has the unknown state "
            f"keys {extra}."
        )
    for key, kind in kinds.items():
        if kind is None:
            continue
        name = state_keys(key, kind)[0]
        if not isinstance(state[name], Tensor) or state[name].is_complex() != param.is_complex():
            raise ValueError(
                f"Checkpoint does not fit: {name} of parameter {index} is {_kind_of(state[name])}, "
                f"the parameter {_kind_of(param)}."
            )
        if tuple(state[name].shape) != tuple(param.shape):
            raise ValueError(
                f"Checkpoint does not fit: {name} of parameter {index} has the shape "
                f"{tuple(state[name].shape)}, the parameter {tuple(param.shape)}. A state saved "
                "from plain shards (FSDP1, ZeRO) fits only the same number of ranks."
            )
        if kind == "8bit":
            name = state_keys(key, kind)[1]
            found = getattr(state[name], "shape", None)
            if found is None or tuple(found) != scale_shape(param):
                raise ValueError(
                    f"Checkpoint does not fit: {name} of parameter {index} is "
                    f"{_kind_of(state[name])}, not of shape {scale_shape(param)}."
                )
        for name in state_keys(key, kind):
            if _layout(state[name]) != _layout(param):
                raise ValueError(
                    f"Checkpoint does not fit: {name} of parameter {index} is laid out as "
                    f"{_layout(state[name])}, the parameter as {_layout(param)}. Load it with "
                    "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict."
                )
    for name in COUNTS:
        value = state.get(name, 0)
        is_count = isinstance(value, (int, float)) or (
            isinstance(value, Tensor) and value.numel() == 1
        )
        if not is_count:
            raise ValueError(
                f"Checkpoint does not fit: {name} of parameter {index} is {_kind_of(value)}, not "
                "one number."
            )


def _layout(tensor: Tensor) -> tuple[Any, ...] | str:
    if not is_dtensor(tensor):
        return "one plain tensor"
    return tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]


def _kind_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    return repr(value)


def _saved_kind(state: dict[str, Any], key: str) -> str | None:
    if key in state:
        return "float32"
    return "8bit" if all(name in state for name in state_keys(key, "8bit")) else None


def adopt_group_options(
    groups: list[dict[str, Any]], before: list[dict[str, Any]], saved: list[dict[str, Any]]
) -> None:
    """Keep present options that the checkpoint lacks, and the present implementation flags.

    Args:
        groups: The groups after loading, changed in place.
        before: Their options before.
        saved: The checkpoint's groups, checked before.
    """
    for group, present, loaded in zip(groups, before, saved, strict=True):
        group.update(_kept(present, loaded))


def _kept(present: dict[str, Any], loaded: dict[str, Any]) -> dict[str, Any]:
    return {n: v for n, v in present.items() if n in IMPLEMENTATION or n not in loaded}


def restore_states(
    optimizer: Optimizer,
    state_dict: dict[str, Any],
    on_device: Callable[[Tensor, dict[str, Any]], bool],
) -> None:
    """Undo torch's cast of every state to the parameter's dtype.

    `Optimizer.load_state_dict` casts all floating-point states but `step` to the dtype of the
    parameter, which rounds the float32 states of a bfloat16 parameter, turns codes into values
    and counts above 256 into other numbers. States saved in another format than the group's
    `state_dtype` are converted.

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
            others = {key: value for key, value in state.items() if key not in _OURS}
            state.clear()
            device = param.device if on_device(param, group) else torch.device("cpu")
            for key in COUNTS:
                if key in saved:
                    count = torch.as_tensor(saved[key], dtype=torch.float32)
                    state[key] = count.detach().clone().reshape(()).to(device)
            for key in MOMENTS:
                kind = moment_format(param, key, group["state_dtype"])
                state.update(restored_moment(saved, key, kind, param))
            state.update(others)


def restored_moment(
    saved: dict[str, Any], key: str, kind: str | torch.dtype, param: Tensor
) -> dict[str, Tensor]:
    """A moment as the parameter needs it, from one of any format and device.

    Args:
        saved: Where its tensors are; left as it is.
        key: One of `MOMENTS`.
        kind: The format that is wanted, see `moment_format`.
        param: The parameter.

    Returns:
        Its entries of the state; none if `saved` has none.
    """
    saved_kind = _saved_kind(saved, key)
    if saved_kind is None:
        return {}
    # Copies, as torch makes by casting: the caller's dictionary must not be trained on.
    taken = {
        name: saved[name].detach().to(device=param.device, copy=True)
        for name in state_keys(key, saved_kind)
    }
    fresh = new_moment(param, key, kind)
    if all(name in taken and taken[name].dtype == fresh[name].dtype for name in fresh):
        return taken
    moment_of(fresh, key).write(moment_of(taken, key).read(), None)
    return fresh

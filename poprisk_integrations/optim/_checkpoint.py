"""Optimizer checkpoints in: our own, AdamW's, and refusals for everything else."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from poprisk_integrations.distributed import is_dtensor
from poprisk_integrations.optim._options import (
    MOMENTS,
    READ_OFF,
    check_group,
    kept_moments,
    needs_device_step,
)
from poprisk_integrations.optim._states import (
    COUNTS,
    moment_format,
    restored_moment,
    saved_kind,
    scale_shape,
    state_keys,
)

__all__ = ["loading"]

logger = logging.getLogger("poprisk_integrations")
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


@contextmanager
def loading(optimizer: Optimizer) -> Iterator[None]:
    """Around `Optimizer.load_state_dict`: checks before it, what it breaks mended after it.

    Hooks, because what a user's own hooks hand over is what counts, and what they see of the
    optimizer afterwards is to be complete.
    """
    before = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    final: dict[str, Any] = {}

    def check(_: Optimizer, incoming: dict[str, Any]) -> None:
        _check_foreign_state(optimizer.param_groups, incoming)
        final.update(incoming)

    def restore(_: Optimizer) -> None:
        groups = zip(optimizer.param_groups, before, final["param_groups"], strict=True)
        for group, present, loaded in groups:
            group.update(_kept(present, loaded))
        _report_sources(before, final["param_groups"])
        _restore_states(optimizer, final)

    handles = (
        optimizer.register_load_state_dict_pre_hook(check),
        optimizer.register_load_state_dict_post_hook(restore, prepend=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _kept(present: dict[str, Any], loaded: dict[str, Any]) -> dict[str, Any]:
    """Options of before that the checkpoint lacks, and those of the process."""
    return {n: v for n, v in present.items() if n in IMPLEMENTATION or n not in loaded}


def _report_sources(before: list[dict[str, Any]], loaded: list[dict[str, Any]]) -> None:
    """A gate that decides by another noise from here on is no error, but nobody's intention."""
    pairs = zip(before, loaded, strict=True)
    sources = {
        (group["noise_source"], saved["noise_source"])
        for group, saved in pairs
        if "noise_source" in saved and saved.get("gate") != "none"
    }
    for present, saved in sorted(sources):
        if present != saved:
            logger.warning(
                "The checkpoint comes from noise_source=%r, this PopRiskAdamW has %r: from here on "
                "its gate decides by another noise. Pass noise_source=%r to go on as before.",
                *(saved, present, saved),
            )


def _check_foreign_state(groups: list[dict[str, Any]], state_dict: dict[str, Any]) -> None:
    saved_ids = chain.from_iterable(g["params"] for g in state_dict["param_groups"])
    params = chain.from_iterable(g["params"] for g in groups)
    owner = dict(zip(saved_ids, params))  # noqa: B905 - torch reports unequal lengths itself
    for group in state_dict["param_groups"]:
        if group.get("amsgrad"):
            raise ValueError(
                "Invalid amsgrad in the checkpoint: True. PopRiskAdamW has no amsgrad."
            )
    saved_groups = state_dict["param_groups"]
    ours = {i for g in saved_groups if g.get("noise_source") == READ_OFF for i in g["params"]}
    for index, state in state_dict["state"].items():
        if index in owner and state:
            _check_parameter_state(
                index, state, owner[index], is_ours="dev_step" in state or index in ours
            )
    for group, saved in zip(groups, state_dict["param_groups"]):  # noqa: B905 - as above
        check_group({**saved, **_kept(group, saved)})


def _check_parameter_state(
    index: Any, state: dict[str, Any], param: Tensor, *, is_ours: bool
) -> None:
    kinds = {key: saved_kind(state, key) for key in MOMENTS}
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
    if extra and not is_ours:
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


def _restore_states(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Undo torch's cast of every state to the parameter's dtype.

    `Optimizer.load_state_dict` casts all floating-point states but `step` to the dtype of the
    parameter, which rounds the float32 states of a bfloat16 parameter, turns codes into values
    and counts above 256 into other numbers. States saved in another format than the group's
    `state_dtype` are converted.
    """
    for group, saved_group in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        for param, index in zip(group["params"], saved_group["params"], strict=True):
            saved, state = state_dict["state"].get(index), optimizer.state.get(param)
            if not saved or not state:
                continue
            others = {key: value for key, value in state.items() if key not in _OURS}
            state.clear()
            device = param.device if needs_device_step(param, group) else torch.device("cpu")
            moments = kept_moments(group)
            for key in COUNTS[: len(moments) - 1]:
                if key in saved:
                    count = torch.as_tensor(saved[key], dtype=torch.float32)
                    state[key] = count.detach().clone().reshape(()).to(device)
            for key in moments:
                kind = moment_format(param, key, group["state_dtype"])
                state.update(restored_moment(saved, key, kind, param))
            state.update(others)

"""Arms x members on disk: a trace that exists is read back, not computed again."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gate_harness.arms import ARMS, Arm
from gate_harness.tasks import Member, Task, as_array
from gate_harness.training import train

__all__ = ["run_arms"]

Trace = dict[str, np.ndarray]
BY_MEMBER_ONLY = ("seed", "condition", "lr", "weight_decay", "finished_at", "diverged")


def run_arms(
    build: Callable[[list[Member]], Task],
    arms: Sequence[str | Arm],
    members: list[Member],
    folder: Path,
    *,
    group: int,
    **options: Any,
) -> dict[str, Trace]:
    """Train what is missing, return all.

    Args:
        build: Makes the task of some members.
        arms: Names of `ARMS`, or arms; what a control imitates is trained first, and returned too
            only if it was asked for.
        members: The models of every arm.
        folder: Of the traces.
        group: Members that train side by side.
        options: `schedule` and `optimizer_class` of `train`.

    Returns:
        The trace of each arm over all members, in their order.
    """
    parts = [members[i : i + group] for i in range(0, len(members), group)]
    known = {**ARMS, **{arm.name: arm for arm in arms if isinstance(arm, Arm)}}
    names = [arm.name if isinstance(arm, Arm) else arm for arm in arms]
    found: dict[str, list[Trace]] = {}
    for k, part in enumerate(parts):
        at_hand: dict[str, Trace] = {}
        for name in names:
            for needed in filter(None, (known[name].needs, name)):
                if needed not in at_hand:
                    recorded = at_hand.get(known[needed].needs or "")
                    path = folder / f"{needed}_{k}.npz"
                    at_hand[needed] = _one(build, known[needed], part, path, recorded, options)
            found.setdefault(name, []).append(at_hand[name])
    return {name: _joined(traces) for name, traces in found.items()}


def _one(
    build: Callable[[list[Member]], Task],
    arm: Arm,
    members: list[Member],
    path: Path,
    recorded: Trace | None,
    options: dict[str, Any],
) -> Trace:
    if path.exists():
        with np.load(path, allow_pickle=False) as file:
            trace = {key: file[key] for key in file.files}
        if all(np.array_equal(trace[key], value) for key, value in as_array(members).items()):
            return trace
        raise ValueError(f"{path} holds other members; remove it or choose another --traces folder")
    began = time.time()
    trace = train(build(members), arm, recorded=recorded, **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp.npz")
    np.savez_compressed(temporary, **trace)
    temporary.replace(path)
    print(f"{path.stem}: {len(members)} members, {time.time() - began:.0f} s", flush=True)
    return trace


def _joined(traces: list[Trace]) -> Trace:
    """One trace of all members; where all of a group finished early, their last rows stay."""
    longest = max(traces, key=lambda trace: len(trace["eval_step"]))
    joined = {"eval_step": longest["eval_step"]}
    for key, like in longest.items():
        if key == "eval_step":
            continue
        columns = [trace[key] for trace in traces]
        if key not in BY_MEMBER_ONLY:
            rows = max(len(column) for column in columns)
            columns = [np.concatenate([c, np.repeat(c[-1:], rows - len(c), 0)]) for c in columns]
        joined[key] = np.concatenate(columns, like.ndim - 1)
    return joined

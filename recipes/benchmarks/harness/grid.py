"""Arms x members on disk: a trace that exists is read back, not computed again."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.harness.arms import ARMS, Arm
from benchmarks.harness.train import Member, Task, Trace, as_array, train

__all__ = ["join", "read_trace", "run_arms", "write_trace"]

ONCE = "eval_step"  # the same for all members; the members are the last axis of the others


def run_arms(
    build: Callable[[list[Member]], Task],
    arms: Sequence[str | Arm],
    members: list[Member],
    folder: Path,
    *,
    group: int,
    **options: Any,
) -> dict[str, Trace]:
    """Train what is missing, return the trace of each arm over all members, in their order.

    Args:
        build: Makes the task of some members.
        arms: Names of `ARMS`, or arms; what a control imitates is trained first, and returned too
            only if it was asked for.
        members: The models of every arm.
        folder: Of the traces.
        group: Members that train side by side.
        options: `schedule` and `optimizer_class` of `train`.
    """
    parts = [members[i : i + group] for i in range(0, len(members), group)]
    known = {**ARMS, **{arm.name: arm for arm in arms if isinstance(arm, Arm)}}
    names = [arm.name if isinstance(arm, Arm) else arm for arm in arms]
    found: dict[str, list[Trace]] = {name: [] for name in names}
    for k, part in enumerate(parts):
        at_hand: dict[str, Trace] = {}
        for name in names:
            for needed in filter(None, (known[name].needs, name)):
                if needed not in at_hand:
                    recorded = at_hand.get(known[needed].needs or "")
                    path = folder / f"{needed}_{k}.npz"
                    at_hand[needed] = _one(build, known[needed], part, path, recorded, options)
            found[name].append(at_hand[name])
    return {name: join(traces) for name, traces in found.items()}


def _one(
    build: Callable[[list[Member]], Task],
    arm: Arm,
    members: list[Member],
    path: Path,
    recorded: Trace | None,
    options: dict[str, Any],
) -> Trace:
    if path.exists():
        trace = read_trace(path)
        if all(np.array_equal(trace[key], value) for key, value in as_array(members).items()):
            return trace
        raise ValueError(f"{path} holds other members; remove it or choose another --traces folder")
    began = time.time()
    trace = train(build(members), arm, recorded=recorded, **options)
    write_trace(path, trace)
    print(f"{path.stem}: {len(members)} members, {time.time() - began:.0f} s", flush=True)
    return trace


def read_trace(path: Path) -> Trace:
    """Arrays only, nothing pickled."""
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def write_trace(path: Path, trace: Trace) -> None:
    """The file whole or not at all, also where several processes write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp.npz")
    np.savez_compressed(temporary, **trace)
    temporary.replace(path)


def join(traces: Sequence[Trace]) -> Trace:
    """One trace of the members of all."""
    first = traces[0]
    return {
        key: first[key] if key == ONCE else np.concatenate([t[key] for t in traces], -1)
        for key in first
    }

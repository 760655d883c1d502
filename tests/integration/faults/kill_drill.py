"""Trains a job in forked processes, kills them at random, resumes until the job is done.

`python -m tests.integration.faults.kill_drill huggingface lightning --kills 50 --cuts 20` prints
one line of JSON. Everything is imported once: each life of a job is a fork of this process.

A life ends in one of three ways, drawn at random:

    timer   this process sends SIGKILL a random time after training began
    file    the process sends it to itself at a random file operation of a checkpoint
    cut     the kernel ends it in the middle of a write (RLIMIT_FSIZE: SIGXFSZ at its default
            action ends a process as abruptly as SIGKILL), so that a file is left half-written
"""

import argparse
import csv
import dataclasses
import importlib
import json
import os
import platform
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

JOBS = ("huggingface", "lightning")
_FILE_EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}


@dataclasses.dataclass
class Outcome:
    """Counts of a drill; what should never happen is named at the end."""

    job: str
    seed: int
    killed: int = 0
    killed_by_timer: int = 0
    killed_at_a_file: int = 0
    cut_in_a_write: int = 0
    inside_a_save: int = 0
    recovered: int = 0
    killed_after_the_stop_was_saved: int = 0
    runs: int = 0
    half_written_checkpoints: int = 0
    framework_would_take_one: int = 0
    lost_steps: int = 0
    differing_runs: int = 0
    own_files_half_written: int = 0
    failed_lives: int = 0
    seconds: float = 0.0
    problems: list[str] = dataclasses.field(default_factory=list)


class Events:
    """What a life tells: lines appended to a file, each by one write."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.on_save: Callable[[], None] | None = None

    def say(self, what: str, step: int) -> None:
        if what == "saving" and self.on_save is not None:
            self.on_save()
        os.write(self._file, f"{what} {step}\n".encode())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("jobs", nargs="+", choices=JOBS)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--cuts", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, help="write the counts here too")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    outcomes = []
    for name in args.jobs:
        job = importlib.import_module(f"tests.integration.faults.{name}_job")
        with tempfile.TemporaryDirectory(prefix="poprisk-drill-") as folder:
            outcomes.append(drill(job, name, Path(folder), args.kills, args.cuts, args.seed))
    print(json.dumps([dataclasses.asdict(outcome) for outcome in outcomes]))
    if args.csv is not None:
        _write_csv(args.csv, outcomes)


def _write_csv(path: Path, outcomes: list[Outcome]) -> None:
    packages = ("torch", "transformers", "lightning", "safetensors")
    rows: list[tuple[str, str, Any]] = [("versions", "python", platform.python_version())]
    rows += [("versions", name, version(name)) for name in packages]
    for outcome in outcomes:
        values = dataclasses.asdict(outcome)
        values["problems"] = len(outcome.problems)
        rows += [(outcome.job, name, value) for name, value in values.items() if name != "job"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("drill", "what", "value"))
        writer.writerows(rows)


def drill(job: Any, name: str, root: Path, kills: int, cuts: int, seed: int) -> Outcome:
    """Kill until `kills` SIGKILLs and `cuts` cut writes have been recovered from."""
    start, rng = time.perf_counter(), random.Random(seed)
    outcome = Outcome(name, seed)
    job.run(root / "warm", Events(root / "events"), 4)  # what is imported late is there for all
    whole, events, seconds = root / "whole", root / "whole.events", time.perf_counter()
    life = _fork(job, whole, events, None)
    assert os.waitpid(life, 0)[1] == 0, "the uninterrupted run failed"
    seconds = time.perf_counter() - seconds
    expected = torch.load(whole / "final.pt", weights_only=True)
    left = ["timer"] * (kills - kills // 2) + ["file"] * (kills // 2) + ["cut"] * cuts
    rng.shuffle(left)
    while left:
        outcome.runs += 1
        folder = root / f"run{outcome.runs}"
        _one_run(job, folder, left, outcome, rng, seconds)
        if not (folder / "final.pt").is_file():
            outcome.problems.append(f"run {outcome.runs} did not end")
            break
        found = torch.load(folder / "final.pt", weights_only=True)
        differing = [name for name in expected if not _same(found[name], expected[name])]
        if differing:
            outcome.differing_runs += 1
            outcome.problems.append(f"run {outcome.runs} differs in {differing}")
        shutil.rmtree(folder)
    outcome.seconds = round(time.perf_counter() - start, 1)
    return outcome


def _one_run(
    job: Any, folder: Path, left: list[str], outcome: Outcome, rng: random.Random, seconds: float
) -> None:
    """One run from its start to its end, through as many lives as it takes."""
    lives, saved, was_killed = 0, 0, False
    while True:
        lives += 1
        # The last lives of a run are not disturbed, or it would hardly ever end.
        kind = left[0] if left and lives <= 8 else None
        events = folder.parent / f"{folder.name}.{lives}.events"
        status = _live(job, folder, events, kind, rng, seconds)
        seen = _read(events)
        began = [step for what, step in seen if what == "began"]
        outcome.killed_after_the_stop_was_saved += any(what == "over" for what, _ in seen)
        if was_killed and began:
            outcome.recovered += 1
            outcome.lost_steps += max(0, saved - began[0])
        was_killed = os.WIFSIGNALED(status)
        if not was_killed:
            if os.WEXITSTATUS(status) != 0:
                outcome.failed_lives += 1
                outcome.problems.append(f"{folder.name}, life {lives}: exit status {status}")
            return
        left.pop(0)
        outcome.killed += os.WTERMSIG(status) == signal.SIGKILL
        outcome.killed_by_timer += kind == "timer"
        outcome.killed_at_a_file += kind == "file"
        outcome.cut_in_a_write += os.WTERMSIG(status) == signal.SIGXFSZ
        saves = [(what, step) for what, step in seen if what in ("saving", "saved")]
        outcome.inside_a_save += bool(saves) and saves[-1][0] == "saving"
        saved = max([saved, *(step for what, step in saves if what == "saved")])
        half, taken = job.half_written(folder)
        outcome.half_written_checkpoints += half
        outcome.framework_would_take_one += taken
        broken = job.broken_own_files(folder)
        outcome.own_files_half_written += len(broken)
        outcome.problems += broken


def _live(
    job: Any, folder: Path, events: Path, kind: str | None, rng: random.Random, seconds: float
) -> int:
    """One life; its exit status."""
    events.touch()
    draw = random.Random(rng.random())
    life = _fork(job, folder, events, (kind, draw) if kind in ("file", "cut") else None)
    if kind == "timer":
        while b"began" not in events.read_bytes():
            done, status = os.waitpid(life, os.WNOHANG)
            if done:
                return status
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.25 * seconds))
        os.kill(life, signal.SIGKILL)
    return os.waitpid(life, 0)[1]


def _fork(job: Any, folder: Path, events: Path, trap: tuple[str, random.Random] | None) -> int:
    sys.stdout.flush()
    life = os.fork()
    if life:
        return life
    status = 1
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        folder.mkdir(exist_ok=True)
        tempfile.tempdir = str(folder)  # Lightning's half-written files lie there
        told = Events(events)
        if trap is not None:
            _set_trap(told, folder, *trap)
        job.run(folder, told, None)
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def _set_trap(events: Events, folder: Path, kind: str, draw: random.Random) -> None:
    """End this process within one of its next saves."""
    saves = draw.randrange(6)
    if kind == "cut":
        limit = int(2 ** draw.uniform(7, 15))  # bytes; the files are of 0.2 to 30 KiB

        def cut() -> None:
            nonlocal saves
            if saves == 0:
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            saves -= 1

        events.on_save = cut
        return
    operations, is_armed = 8 * saves + draw.randrange(8), False

    def arm() -> None:
        nonlocal is_armed
        is_armed = True

    events.on_save = arm

    def see(event: str, args: tuple[Any, ...]) -> None:
        nonlocal operations
        if not is_armed or event not in _FILE_EVENTS or str(folder) not in str(args[0]):
            return
        if event == "open" and (args[1] is None or not set(str(args[1])) & set("wax")):
            return
        if operations == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        operations -= 1

    sys.addaudithook(see)


def _read(events: Path) -> list[tuple[str, int]]:
    lines = [line.split() for line in events.read_text().splitlines()]
    return [(what, int(step)) for what, step in lines]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


if __name__ == "__main__":
    main()

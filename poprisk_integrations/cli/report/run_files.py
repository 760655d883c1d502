"""Which files of a directory belong to the run that is to be reported."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from poprisk_integrations.cli.errors import UsageError

__all__ = ["RunFiles", "find_run"]

STATE, CSV, STOP, NOISE, FLIPS = (
    "trainer_state.json",
    "metrics.csv",
    "poprisk_stop.json",
    "poprisk_noise.json",
    "flip_report.csv",
)
_LOGS = (STATE, CSV, STOP, NOISE, FLIPS)
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_OTHER_TOOLS = (
    ("events.out.tfevents", "TensorBoard"),
    ("wandb", "Weights & Biases"),
    ("mlruns", "MLflow"),
    (".neptune", "Neptune"),
    (".aim", "Aim"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFiles:
    """Where a run's logs are.

    Attributes:
        directory: Of the run: its settings are looked for here.
        logs: Name -> path of each log that was found; `trainer_state.json` may have two, of the
            run and of its newest checkpoint.
        notes: What a reader should know of the choice.
    """

    directory: Path
    logs: dict[str, list[Path]]
    notes: tuple[str, ...] = ()

    def first(self, name: str) -> Path | None:
        """The log of that name."""
        return next(iter(self.logs.get(name, [])), None)


def find_run(path: Path) -> RunFiles:
    """The logs of a run.

    A directory without logs of its own may hold runs: the newest is taken. A log that is not in
    the run's directory and occurs once below `path` is taken too: Lightning's callbacks may write
    beside the checkpoints. Of several reports of a stop the newest counts.

    Args:
        path: Directory of a run, of runs, or one of the logs.

    Raises:
        UsageError: If there is none.
    """
    if path.is_file():
        return _around(path)
    if not path.is_dir():
        raise UsageError(f"Invalid run_dir: {str(path)!r}. There is no such directory.")
    found = _below(path)
    if not any(found.values()):
        raise UsageError(
            f"Invalid run_dir: {str(path)!r}. No {STOP} in it, nor {STATE} or {CSV}: the run had "
            f"no callback of this package, or has not written its logs yet.{_other_tool(path)}"
        )
    notes: tuple[str, ...] = ()
    directories = {_home(log, path) for logs in found.values() for log in logs}
    if path in directories:
        directory = path
    else:
        newest = max((log for logs in found.values() for log in logs), key=_age)
        directory = _home(newest, path)
        others = len({d for d in directories if _is_run(d, found, path)} - {directory})
        text = f"This is {directory.relative_to(path)}, the newest run in the directory"
        notes = (f"{text}; {others} more are not shown." if others else f"{text}.",)
    logs = {name: _of_run(name, files, directory, path) for name, files in found.items()}
    return RunFiles(directory=directory, logs=logs, notes=notes)


def _around(file: Path) -> RunFiles:
    """The run of one given log; that very file counts."""
    name = file.name if file.name in _LOGS else STOP
    directory = file.parent
    beside = {log: [directory / log] for log in _LOGS if (directory / log).is_file()}
    return RunFiles(directory=directory, logs={**beside, name: [file]})


def _below(path: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {name: [] for name in _LOGS}
    for folder, _, names in os.walk(path):
        for name in sorted(names):
            is_stop = name.startswith("poprisk_stop") and name.endswith(".json")
            key = STOP if is_stop else name
            if key in found:
                found[key].append(Path(folder) / name)
    return found


def _of_run(name: str, files: list[Path], directory: Path, path: Path) -> list[Path]:
    own = [file for file in files if _home(file, path) == directory]
    if name == STATE:
        at_home = [file for file in own if file.parent == directory]
        rest = [file for file in own if file.parent != directory]
        return at_home + sorted(rest, key=lambda file: _step(file.parent))[-1:]
    if name == STOP:  # beside checkpoints too, at any depth
        inside = [file for file in files if directory in file.parents]
        own = sorted(inside, key=_age)[-1:]
    return own or (files if len(files) == 1 else [])


def _home(log: Path, path: Path) -> Path:
    """The run's directory, also for what lies in a checkpoint; unless that is what was given."""
    if log.parent == path:
        return path
    return log.parent.parent if _CHECKPOINT.fullmatch(log.parent.name) else log.parent


def _step(checkpoint: Path) -> int:
    match = _CHECKPOINT.fullmatch(checkpoint.name)
    return int(match.group(1)) if match else -1


def _is_run(directory: Path, found: dict[str, list[Path]], path: Path) -> bool:
    return any(_home(log, path) == directory for name in (STATE, CSV) for log in found[name])


def _age(file: Path) -> float:
    return file.stat().st_mtime


def _other_tool(path: Path) -> str:
    names = list(_names(path))
    tools = [tool for start, tool in _OTHER_TOOLS if any(n.startswith(start) for n in names)]
    return f" Logs of {' and '.join(tools)} cannot be read." if tools else ""


def _names(path: Path) -> Iterable[str]:
    for _, folders, files in os.walk(path):
        yield from folders
        yield from files

"""The newest checkpoint that a killed run has written to its end."""

import json
import logging
import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

__all__ = ["last_whole_checkpoint"]

_NAME = re.compile(r"checkpoint-(\d+)")

logger = logging.getLogger(__name__)


def last_whole_checkpoint(
    output_dir: str | os.PathLike[str], also: Sequence[str] = ()
) -> str | None:
    """Directory of the newest `checkpoint-N` of a run that no kill has left half-written.

    Trainer writes a checkpoint file by file under its final name, `trainer_state.json` last, and
    our callbacks add theirs after that. `resume_from_checkpoint=True` takes the newest directory
    whatever is in it: it fails on a missing or cut file, and resumes without the unfinished window
    if only that is missing. What is looked at is cheap, and nothing is unpickled: text is parsed,
    and of files with weights and states the end must be there.

    Args:
        output_dir: The run's; may be missing.
        also: Names of further files that a checkpoint must have.

    Returns:
        For `trainer.train(resume_from_checkpoint=...)`: None, to start afresh, if there is none.

    Example:
        >>> last_whole_checkpoint("no/run/yet") is None
        True
    """
    for path in _newest_first(Path(output_dir)):
        problem = _what_is_missing(path, also)
        if problem is None:
            return str(path)
        logger.warning("%s is not whole (%s): looking for an older one.", path, problem)
    return None


def _newest_first(directory: Path) -> list[Path]:
    found = directory.glob("checkpoint-*") if directory.is_dir() else ()
    steps = {int(m.group(1)): path for path in found if (m := _NAME.fullmatch(path.name))}
    return [steps[step] for step in sorted(steps, reverse=True) if steps[step].is_dir()]


def _what_is_missing(checkpoint: Path, also: Sequence[str]) -> str | None:
    """The first thing wrong with a checkpoint; None if it is whole."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    for path in files:
        try:
            _check_end(path)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return f"{path.name} is cut off"
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        needed = [*_window_files(state), *also]
    except FileNotFoundError:
        return f"no {TRAINER_STATE_NAME}"
    except (TypeError, KeyError, AttributeError):
        return f"{TRAINER_STATE_NAME} is none of Trainer"
    return next((f"no {name}" for name in needed if not (checkpoint / name).is_file()), None)


def _check_end(path: Path) -> None:
    """Raise if a file of a known format is cut off."""
    if path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))
    elif path.suffix == ".safetensors":
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length < path.stat().st_size:
                raise ValueError(length)
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name[:2] != "__"]
        if path.stat().st_size != 8 + length + max(ends, default=0):
            raise ValueError(ends)
    elif path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            if file.read(1) != b"\x80":  # the format before archives, whose end is not marked
                raise ValueError(path)


def _window_files(state: dict[str, Any]) -> Iterator[str]:
    """Files that our callbacks have written, by their own account."""
    for exported in state["stateful_callbacks"].values():
        for entry in exported if isinstance(exported, list) else [exported]:
            progress = entry.get("attributes", {}).get("progress_state") or {}
            if progress.get("window_file"):
                yield progress["window_file"]

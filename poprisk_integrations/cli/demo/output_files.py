"""Writes the demo's files so that none is ever half-written."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from poprisk_integrations.cli.errors import UsageError

__all__ = ["prepare_directory", "write_atomically", "write_json"]


def prepare_directory(path: str | os.PathLike[str]) -> Path:
    """Create a directory if need be and prove that files can be written to it.

    Args:
        path: The directory.

    Raises:
        UsageError: If it cannot be created or written, in one line with the reason.
    """
    directory = Path(path)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(b"x")
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(
            f"--out {directory}: cannot write there ({reason}). Choose another directory."
        ) from error
    return directory


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Write to a temporary name beside `path`, flush to disk, then rename.

    Whoever looks at `path` sees the old file or the whole new one. A killed process may leave
    the temporary file; its name starts with a dot and ends with the suffix of `path`, and the
    next write of the same file overwrites it.

    Args:
        path: The file.
        write: Writes the content to the path it is given.
    """
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON (no NaN) atomically.

    Args:
        path: The file.
        value: Plain values.
    """
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")

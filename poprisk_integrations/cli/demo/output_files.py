"""Where the demo writes, and its JSON."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from poprisk_integrations.cli.errors import UsageError
from poprisk_integrations.cli.output import writing

__all__ = ["prepare_directory", "write_json"]


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


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON (no NaN), whole or not at all.

    Args:
        path: The file.
        value: Plain values.
    """
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")

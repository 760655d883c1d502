"""JSON files with one clear line for each way in which they can be bad."""

import json
from pathlib import Path
from typing import Any

from poprisk_integrations.cli.errors import UsageError, one_line

__all__ = ["read_json", "read_text"]


def read_text(path: Path) -> str:
    """Content of a text file.

    Raises:
        UsageError: If it is not UTF-8, or cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"Invalid run_dir: {str(path)!r} is not text.") from None
    except OSError as error:
        raise UsageError(f"Invalid run_dir: {one_line(error)}.") from None


def read_json(path: Path) -> Any:
    """Content of a JSON file.

    Raises:
        UsageError: If it is not JSON, as when it was only half written.
    """
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        hint = "" if path.stat().st_size else ": it is empty"
        reason = hint or f" ({error})"
        raise UsageError(
            f"Invalid run_dir: {str(path)!r} is not JSON{reason}. Half written? Try again."
        ) from None

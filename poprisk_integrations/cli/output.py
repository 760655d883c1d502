"""Output files of the commands: whole or absent, and one line where they cannot be written."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from poprisk_integrations._files import write_whole
from poprisk_integrations.cli.errors import UsageError, one_line

__all__ = ["writing"]


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """As `write_whole`; the error names the file that was wanted, not the temporary one.

    Args:
        path: File to write.

    Raises:
        UsageError: If it cannot be written.
    """
    try:
        with write_whole(path) as temporary:
            yield temporary
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise UsageError(f"cannot write {str(path)!r} ({reason})") from error

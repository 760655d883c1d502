"""Files and directories that are whole or absent."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["write_whole"]


@contextmanager
def write_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its place if the block ends well.

    Whatever the block raises (a full disk, an interrupt) leaves neither a half-written file nor
    the temporary one, and an older file of this name as it was. Give the temporary path to
    whatever writes: a library that adds an extension of its own finds `path`'s there.

    Args:
        path: File to write, or directory that is not there yet; what it lies in is created if
            missing.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "new" / "numbers.csv"
        >>> with write_whole(target) as temporary:
        ...     _ = temporary.write_text("a,b")
        >>> target.read_text(), os.listdir(target.parent)
        ('a,b', ['numbers.csv'])
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # The process in the name: two ranks, or two runs, that write one file do not meet half-way.
    temporary = target.with_name(f".{target.stem}.{os.getpid()}.tmp{target.suffix}")
    try:
        yield temporary
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            if temporary.is_dir():
                shutil.rmtree(temporary)
            temporary.unlink(missing_ok=True)
        raise

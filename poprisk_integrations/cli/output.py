"""What commands write and print: files that are whole or absent, pictures, plain lines."""

import io
import logging
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from poprisk_integrations._files import write_whole
from poprisk_integrations.cli.errors import UsageError, one_line

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "NO_MATPLOTLIB",
    "check_directory",
    "held_back",
    "only_errors",
    "progress_bar",
    "say",
    "write_figure",
    "writing",
]

_LIBRARIES = ("accelerate", "datasets", "deepspeed", "transformers", "trl")
NO_MATPLOTLIB = "No picture: matplotlib not found. Run: pip install 'poprisk_integrations[demo]'"


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """As `write_whole`; the error names the file that was wanted, not the temporary one."""
    try:
        with write_whole(path) as temporary:
            yield temporary
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise UsageError(f"cannot write {str(path)!r} ({reason})") from error


def check_directory(option: str, path: Path) -> None:
    """Refuse a file to write whose directory does not exist."""
    if not path.absolute().parent.is_dir():
        raise UsageError(f"Invalid {option}: {str(path)!r}. Its directory does not exist.")


def write_figure(path: Path, draw: Callable[[], Any]) -> bool:
    """Draw and write a PNG; False where there is no matplotlib to draw with."""
    if find_spec("matplotlib") is None:
        return False
    figure = draw()
    with writing(path) as temporary:
        figure.savefig(temporary, format="png")
    return True


def say(console: "Console", text: str, style: str = "") -> None:
    """Lines as they are: no markup, no numbers in colour; a terminal breaks them between words.

    But not within a command in backticks: it is to be copied.
    """
    if console.is_terminal:
        glued = re.sub("`[^`]*`", lambda found: found[0].replace(" ", "\0"), text)
        lines = [
            textwrap.fill(line, console.width, break_long_words=False, break_on_hyphens=False)
            for line in glued.split("\n")
        ]
        text = "\n".join(lines).replace("\0", " ")
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def held_back() -> Iterator[None]:
    """Hold back Python-level output and warnings; on an error print what was held, then raise.

    Progress bars and notes of the libraries would tear our own bar apart. Whoever prints on purpose
    inside must have kept the real stream beforehand, as a rich Console does with `file=sys.stderr`.
    """
    import datasets
    import transformers

    held, real = io.StringIO(), sys.stderr
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with (
            only_errors(*_LIBRARIES),
            warnings.catch_warnings(),
            redirect_stdout(held),
            redirect_stderr(held),
        ):
            warnings.simplefilter("ignore")
            yield
    except Exception:
        real.write(held.getvalue())
        raise
    finally:
        datasets.enable_progress_bars()
        transformers.logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def only_errors(*names: str) -> Iterator[None]:
    """These loggers say nothing but errors meanwhile."""
    levels = {logging.getLogger(name): logging.getLogger(name).level for name in names}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


@contextmanager
def progress_bar(
    total: int, desc: str, leave: bool = False, *, shown: bool = True
) -> Iterator[Any]:
    """Like tqdm: a bar on a terminal, nothing elsewhere; `update(step)`, or `update()` for one."""
    from rich.console import Console

    console = Console(file=sys.stderr)
    if not shown or not console.is_terminal:
        yield SimpleNamespace(update=lambda step=None: None)
        return
    from rich.progress import Progress

    with Progress(console=console, transient=not leave) as bar:
        task = bar.add_task(desc, total=total)

        def update(step: int | None = None) -> None:
            bar.update(task, completed=step, advance=1 if step is None else None)

        yield SimpleNamespace(update=update)

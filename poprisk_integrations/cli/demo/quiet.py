"""Keeps third-party chatter off the screen, and shows it after all if something fails."""

# transformers leaves some of its functions untyped.
# mypy: disable-error-code="no-untyped-call"

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator

__all__ = ["held_back"]

_LIBRARIES = ("accelerate", "datasets", "deepspeed", "transformers", "trl")


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Hold back Python-level output and warnings; on an error print what was held, then raise.

    Progress bars and notes of the libraries would tear the demo's own bar apart. Whoever prints
    on purpose inside must have kept the real stream beforehand, as a rich Console does when it
    is given `file=sys.stderr`.
    """
    import datasets
    import transformers

    held = io.StringIO()
    real = sys.stderr
    bars = (
        not datasets.are_progress_bars_disabled(),
        transformers.logging.is_progress_bar_enabled(),
    )
    levels = {name: logging.getLogger(name).level for name in _LIBRARIES}
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    for name in _LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(held),
            contextlib.redirect_stderr(held),
        ):
            warnings.simplefilter("ignore")
            yield
    except Exception:
        real.write(held.getvalue())
        raise
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if bars[0]:
            datasets.enable_progress_bars()
        if bars[1]:
            transformers.logging.enable_progress_bar()

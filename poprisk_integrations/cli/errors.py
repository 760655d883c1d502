"""Errors that end in one line on stderr."""

import argparse
from collections.abc import Callable

__all__ = ["UsageError", "at_least", "one_line"]


class UsageError(Exception):
    """The user can fix this; the message says how, in one line."""


def one_line(error: BaseException) -> str:
    r"""The message of an error without line breaks, and never empty.

    Example:
        >>> one_line(ValueError("a\n  b"))
        'a b'
        >>> one_line(FileNotFoundError(2, "No such file or directory", "x.yaml"))
        "No such file or directory: 'x.yaml'"
    """
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {str(error.filename)!r}"
    return " ".join(str(error).split()) or type(error).__name__


def at_least(smallest: int) -> Callable[[str], int]:
    """A type of an option: an integer from this one on."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < smallest:
            raise argparse.ArgumentTypeError(f"{text!r} must be an integer >= {smallest}")
        return int(text)

    return parse

"""Errors that end in one line on stderr."""

__all__ = ["UsageError", "one_line"]


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

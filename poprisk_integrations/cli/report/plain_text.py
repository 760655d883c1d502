"""Text and numbers from files, made fit to be shown."""

import math
import re
from typing import Any

__all__ = ["NOTHING", "floating", "number", "plain", "short", "shown"]

NOTHING = "-"  # stands for a number that is not known
# Controls and lone surrogates fit no page; marks that turn the writing direction make text lie.
_UNFIT = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def plain(value: Any) -> str:
    r"""Text on one line without control characters; what HTML means by it is not its business.

    Example:
        >>> plain("a\tb\n c")
        'a b c'
    """
    return _UNFIT.sub("\ufffd", " ".join(str(value).split()))


def short(text: str, length: int = 28) -> str:
    """Text with its middle left out where it is too long.

    Example:
        >>> short("a-very-long-name-of-a-run", 11)
        'a-ver…a-run'
    """
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return f"{text[:head]}…{text[-(length - 1 - head) :]}"


def number(value: Any) -> float | None:
    """A finite number, or None for anything else.

    Example:
        >>> number(3), number(True), number(math.nan), number("3")
        (3.0, None, None, None)
    """
    found = floating(value)
    return found if found is not None and math.isfinite(found) else None


def floating(value: Any) -> float | None:
    """A number, which may be NaN or infinite, or None for anything else.

    Example:
        >>> floating(10**400), floating("3")
        (inf, None)
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer beyond floats
        return math.inf if value > 0 else -math.inf


def shown(value: float | None, digits: int = 4) -> str:
    """A number for people; a dash for none.

    Example:
        >>> shown(0.123456), shown(12000.0), shown(None)
        ('0.1235', '12000', '-')
    """
    if value is None:
        return NOTHING
    is_count = float(value).is_integer() and abs(value) < 1e15
    return f"{value:.0f}" if is_count else f"{value:.{digits}g}"

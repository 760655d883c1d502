"""`TrainingArguments.optim_args` as typed options of PopRiskAdamW."""

import difflib
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from poprisk_integrations.optim import PopRiskAdamW
from poprisk_integrations.optim._options import PUBLISHED

__all__ = ["parse_optim_args", "plain_types", "read_as", "valid_keys"]

# Set elsewhere in TrainingArguments: a second place would leave open which one wins.
_ELSEWHERE = {
    "lr": "learning_rate",
    "betas": "adam_beta1 and adam_beta2",
    "eps": "adam_epsilon",
    "weight_decay": "weight_decay",
}
_FLAGS = {"true": True, "1": True, "false": False, "0": False}


def valid_keys() -> list[str]:
    """Keys that `optim_args` may hold: the keyword options of PopRiskAdamW, and `no_gate`."""
    parameters = inspect.signature(PopRiskAdamW.__init__).parameters.values()
    own = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    return sorted([*own, "no_gate"])


def parse_optim_args(
    text: str | Mapping[str, Any] | Sequence[str] | None, **overrides: Any
) -> dict[str, Any]:
    """Typed options from "key=value,key=value", or from what a YAML file makes of such options.

    Types are those of PopRiskAdamW's signature; ranges are checked by the optimizer itself.
    Spaces and line breaks do not count. `no_gate` holds substrings of parameter names, joined by
    "|".
    `overrides`, as text or typed, win over `text`. An unknown, repeated or empty key and an
    ill-typed value are a ValueError in one line.

    Example:
        >>> parse_optim_args("gate=soft, alpha=0.2, no_gate=embed|norm")
        {'gate': 'soft', 'alpha': 0.2, 'no_gate': ('embed', 'norm')}
        >>> parse_optim_args({"alpha": "finite", "dataset_size": 1000})
        {'alpha': 'finite', 'dataset_size': 1000}
    """
    given: dict[str, Any] = {}
    if isinstance(text, Mapping):
        given, text = {str(key): value for key, value in text.items()}, None
    elif text is not None and not isinstance(text, str):
        text = ",".join(str(item) for item in text)
    whole = "".join((text or "").split())
    for item in whole.split(",") if whole else []:
        key, equals, value = item.partition("=")
        if not equals or not key or not value or "=" in value:
            raise _error(f"{item!r} is not of the form key=value")
        if key in given:
            raise _error(f"{key!r} is given twice")
        given[key] = value
    # no keys any more, but optim="poprisk_adamw_paper" takes them
    hints = {**get_type_hints(PopRiskAdamW.__init__), "gate_eps": float, "noise_mean": str}
    return {k: _typed(k, v, hints) for k, v in {**given, **overrides}.items()}


def _typed(key: str, value: Any, hints: Mapping[str, Any]) -> Any:
    keys = valid_keys()
    if key in _ELSEWHERE:
        raise _error(f"{key!r} is set by TrainingArguments({_ELSEWHERE[key]}=...)")
    if key not in keys and key not in PUBLISHED:
        close = difflib.get_close_matches(key, keys, n=1)
        raise _error(f"unknown key {key!r}" + (f" (did you mean {close[0]!r}?)" if close else ""))
    if key == "no_gate":
        return _patterns(value)
    if not isinstance(value, str):
        return value  # typed already; the optimizer checks it
    try:
        return read_as(value, hints[key])
    except ValueError:
        names = [kind.__name__.replace("NoneType", "none") for kind in plain_types(hints[key])]
        wanted = " or ".join(names)
        raise _error(f"{key}={value!r} is not a valid {wanted}") from None


def read_as(value: Any, hint: Any) -> Any:
    """A value, as a rule text, as the narrowest type of an annotation that it can be read as.

    Example:
        >>> read_as("0.5", float | str), read_as("auto", float | str), read_as("none", int | None)
        (0.5, 'auto', None)
    """
    allowed = plain_types(hint)
    for kind, read in _READERS:
        if kind in allowed:
            with suppress(ValueError, TypeError, KeyError):
                return read(value)
    raise ValueError(value)


def plain_types(hint: Any) -> tuple[type, ...]:
    """Those of an annotation: `float | Literal["auto"] | None` -> (float, str, NoneType)."""
    if get_origin(hint) is Literal:
        return tuple(dict.fromkeys(map(type, get_args(hint))))
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(member for part in get_args(hint) for member in plain_types(part))
    return (hint,)


def _patterns(value: str | tuple[str, ...] | list[str]) -> tuple[str, ...]:
    parts = value.split("|") if isinstance(value, str) else list(value)
    if not parts or not all(isinstance(p, str) and p for p in parts):
        raise _error(f"no_gate={value!r} is not a list of parts of parameter names, as embed|norm")
    return tuple(parts)


# From the narrowest to the widest: text is what nothing else could read.
_READERS: tuple[tuple[type, Callable[[str], Any]], ...] = (
    (type(None), lambda value: {"none": None, "null": None}[str(value).lower()]),
    (bool, lambda value: _FLAGS[str(value).lower()]),
    (int, int),
    (float, float),
    (str, str),
)


def _error(what: str) -> ValueError:
    return ValueError(f"Invalid optim_args: {what}. Valid keys: {', '.join(valid_keys())}.")

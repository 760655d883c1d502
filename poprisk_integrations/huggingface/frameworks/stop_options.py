"""The stop, from options as frameworks hand them over: typed, or as text."""

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from poprisk_integrations.huggingface.callbacks import PopRiskEarlyStoppingCallback

__all__ = ["STOP_OPTIONS", "stop_callbacks"]

_SWITCH = "poprisk_stop"
_WORDS = {"true": True, "1": True, "yes": True, "on": True}
_WORDS |= {"false": False, "0": False, "no": False, "off": False}


def stop_callbacks(options: Mapping[str, Any]) -> list[PopRiskEarlyStoppingCallback]:
    """The stop that the options describe: a list of one callback, or of none.

    | option | argument of `PopRiskEarlyStoppingCallback` |
    |---|---|
    | `poprisk_stop` | whether to add it at all, true by default |
    | `poprisk_stop_kappa` | `kappa` |
    | `poprisk_stop_window` | `window`, a number or "auto" |
    | `poprisk_stop_threshold` | `threshold` |
    | `poprisk_stop_min_steps` | `min_steps` |
    | `poprisk_stop_action` | `action`, "stop" or "monitor" |
    | `poprisk_stop_restore` | `restore`, "stop", "onset" or "none" |

    Args:
        options: By name; None counts as left out.

    Raises:
        ValueError: For an unknown option, an ill-typed or disallowed value.

    Example:
        >>> (callback,) = stop_callbacks({"poprisk_stop_kappa": "3", "poprisk_stop_window": 20})
        >>> callback.kappa, callback.state()["args"]["window"]
        (3.0, 20)
        >>> stop_callbacks({"poprisk_stop": False})
        []
    """
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in STOP_OPTIONS:
            close = difflib.get_close_matches(name, STOP_OPTIONS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"Invalid option {name!r}.{hint} Known: {', '.join(sorted(STOP_OPTIONS))}."
            )
    typed = {name: _typed(name, value) for name, value in given.items()}
    if not typed.pop(_SWITCH, True):
        return []
    arguments = {name.removeprefix(f"{_SWITCH}_"): value for name, value in typed.items()}
    try:
        return [PopRiskEarlyStoppingCallback(**arguments)]
    except ValueError as error:  # "Invalid kappa: ...": here it is called poprisk_stop_kappa
        raise ValueError(str(error).replace("Invalid ", f"Invalid {_SWITCH}_", 1)) from None


def _typed(name: str, value: Any) -> Any:
    try:
        return STOP_OPTIONS[name](value)
    except (TypeError, ValueError, KeyError):
        raise ValueError(f"Invalid {name}: {value!r}.") from None


def _switch(value: Any) -> bool:
    return _WORDS[str(value).lower()]


def _window(value: Any) -> int | str:
    return "auto" if value == "auto" else int(value)


def _restore(value: Any) -> str | None:
    return None if str(value).lower() == "none" else str(value)


# Each option with what reads its value.
STOP_OPTIONS: dict[str, Callable[[Any], Any]] = {
    _SWITCH: _switch,
    f"{_SWITCH}_kappa": float,
    f"{_SWITCH}_window": _window,
    f"{_SWITCH}_threshold": float,
    f"{_SWITCH}_min_steps": int,
    f"{_SWITCH}_action": str,
    f"{_SWITCH}_restore": _restore,
}

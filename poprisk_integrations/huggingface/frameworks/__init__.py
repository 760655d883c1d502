"""Entry points for frameworks that build Trainer themselves: one module per framework.

Each registers the optimizer names and adds the stop, with its options from the framework's own
configuration where that allows. No framework is imported unless its module is.
"""

import difflib
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Union, get_type_hints

from poprisk_integrations.diagnostics.stop_options import StopOptions
from poprisk_integrations.huggingface.callbacks import PopRiskEarlyStoppingCallback
from poprisk_integrations.huggingface.optim_args import plain_types, read_as

__all__ = ["STOP_OPTIONS", "require_framework", "stop_callbacks"]

_SWITCH = "poprisk_stop"
_WORDS = {"true": True, "1": True, "yes": True, "on": True}
_WORDS |= {"false": False, "0": False, "no": False, "off": False}
_OF_THE_STOP = (
    *("criterion", "sit_out", "patience", "kappa", "window", "threshold", "min_steps"),
    *("action", "restore"),
)

# Each option with its type.
STOP_OPTIONS: dict[str, Any] = {_SWITCH: bool} | {
    f"{_SWITCH}_{name}": Union[plain_types(hint)]  # noqa: UP007 (made of a tuple)
    for name, hint in get_type_hints(StopOptions).items()
    if name in _OF_THE_STOP
}


def require_framework(module: str, pip_name: str) -> None:
    """Raise ImportError with what to run if a framework is missing.

    Unlike a failing import it does not hide what is missing inside an installed framework.

    Example:
        >>> require_framework("transformers", "transformers")
    """
    if find_spec(module) is None:
        raise ImportError(
            f"{pip_name} not found: this module plugs into it. Run: pip install {pip_name}"
        )


def stop_callbacks(options: Mapping[str, Any]) -> list[PopRiskEarlyStoppingCallback]:
    """The stop that the options describe: a list of one callback, or of none.

    `poprisk_stop` says whether to add it at all, true by default; `poprisk_stop_kappa` and the
    other `STOP_OPTIONS` are the argument of this name of `PopRiskEarlyStoppingCallback`, where
    "none" is None. None counts as left out; an unknown option, an ill-typed or disallowed value is
    a ValueError.

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
    checked = StopOptions.named(f"{_SWITCH}_", arguments)
    return [PopRiskEarlyStoppingCallback(**checked.arguments())]


def _typed(name: str, value: Any) -> Any:
    try:
        if name == _SWITCH:
            return _WORDS[str(value).lower()]
        return read_as(value, STOP_OPTIONS[name])
    except (ValueError, KeyError):
        raise ValueError(f"Invalid {name}: {value!r}.") from None

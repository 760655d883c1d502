"""Options of the stop, typed or as text, become the callback's arguments or one clear error."""

import re
from typing import Any

import pytest

from poprisk_integrations.huggingface import PopRiskEarlyStoppingCallback
from poprisk_integrations.huggingface.frameworks import STOP_OPTIONS, stop_callbacks

TYPED: dict[str, Any] = {
    "criterion": "signal",
    "sit_out": 0.2,
    "patience": 4,
    "kappa": 3.0,
    "window": 20,
    "threshold": 0.9,
    "min_steps": 7,
    "action": "monitor",
    "restore": None,
}
TEXT = {**{name: str(value) for name, value in TYPED.items()}, "restore": "none"}


def arguments(options: dict[str, Any]) -> dict[str, Any]:
    (callback,) = stop_callbacks({f"poprisk_stop_{name}": v for name, v in options.items()})
    found: dict[str, Any] = callback.state()["args"]
    return found


@pytest.mark.parametrize("options", [TYPED | {"restore": "none"}, TEXT])
def test_every_option_arrives(options: dict[str, Any]) -> None:
    found = arguments(options)
    for name, value in TYPED.items():
        assert found[name] == value
        assert type(found[name]) is type(value)
    assert {f"poprisk_stop_{name}" for name in options} == set(STOP_OPTIONS) - {"poprisk_stop"}


def test_left_out_means_the_defaults() -> None:
    expected = PopRiskEarlyStoppingCallback().state()["args"]
    assert arguments({}) == expected
    assert arguments(dict.fromkeys(TYPED)) == expected  # None: not given
    assert arguments({"window": "auto"}) == expected


@pytest.mark.parametrize(
    ("value", "count"),
    [
        *((value, 0) for value in (False, "false", "0", "no", "OFF")),
        *((value, 1) for value in (True, "true", "1", "Yes", "on", None)),
    ],
)
def test_switched_on_and_off(value: Any, count: int) -> None:
    assert len(stop_callbacks({"poprisk_stop": value, "poprisk_stop_kappa": 3})) == count


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("_kapa", 3, "Invalid option 'poprisk_stop_kapa'. Did you mean 'poprisk_stop_kappa'?"),
        ("_", 3, "Known: poprisk_stop, poprisk_stop_action"),
        ("", "perhaps", "Invalid poprisk_stop: 'perhaps'"),
        ("_kappa", "much", "Invalid poprisk_stop_kappa: 'much'"),
        ("_kappa", 0.5, "Invalid poprisk_stop_kappa: 0.5"),
        ("_window", "epoch", "Invalid poprisk_stop_window: 'epoch'"),
        ("_min_steps", [1], "Invalid poprisk_stop_min_steps"),
        ("_restore", "last", "Invalid poprisk_stop_restore: 'last'"),
    ],
)
def test_mistakes(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        stop_callbacks({f"poprisk_stop{name}": value})
    assert "\n" not in str(error.value)

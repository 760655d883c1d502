"""Options of the stop, typed or as text, become the callback's arguments or one clear error."""

from typing import Any

import pytest

from poprisk_integrations.huggingface import PopRiskEarlyStoppingCallback
from poprisk_integrations.huggingface.frameworks.stop_options import STOP_OPTIONS, stop_callbacks

TYPED: dict[str, Any] = {
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


@pytest.mark.parametrize("value", [False, "false", "0", "no", "OFF"])
def test_switched_off(value: Any) -> None:
    assert stop_callbacks({"poprisk_stop": value, "poprisk_stop_kappa": 3}) == []


@pytest.mark.parametrize("value", [True, "true", "1", "Yes", "on", None])
def test_switched_on(value: Any) -> None:
    assert len(stop_callbacks({"poprisk_stop": value})) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"poprisk_stop_kapa": 3}, "Invalid option 'poprisk_stop_kapa'. Did you mean 'poprisk_st"),
        ({"poprisk": 3}, "Known: poprisk_stop, poprisk_stop_action"),
        ({"poprisk_stop": "perhaps"}, "Invalid poprisk_stop: 'perhaps'"),
        ({"poprisk_stop_kappa": "much"}, "Invalid poprisk_stop_kappa: 'much'"),
        ({"poprisk_stop_kappa": 0.5}, "Invalid poprisk_stop_kappa: 0.5"),
        ({"poprisk_stop_window": "epoch"}, "Invalid poprisk_stop_window: 'epoch'"),
        ({"poprisk_stop_window": 1}, "Invalid poprisk_stop_window"),
        ({"poprisk_stop_min_steps": [1]}, "Invalid poprisk_stop_min_steps"),
        ({"poprisk_stop_action": "halt"}, "Invalid poprisk_stop_action: 'halt'"),
        ({"poprisk_stop_restore": "best"}, "Invalid poprisk_stop_restore: 'best'"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="Invalid") as error:
        stop_callbacks(options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)

"""Bad values are refused when callbacks are constructed; defaults are those of the contract."""

import inspect
import pickle

import pytest

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.lightning import (
    PopRiskEarlyStopping,
    PopRiskLRCut,
    PopRiskMonitor,
    PopRiskOptimizer,
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kappa": 0.5}, r"Invalid kappa: 0.5. Must be finite and >= 1"),
        ({"kappa": float("nan")}, "Invalid kappa: nan"),
        ({"threshold": 0.0}, "Invalid threshold: 0.0"),
        ({"min_steps": -1}, "Invalid min_steps: -1"),
        ({"window": 3}, "Invalid window: 3. Must be 'auto' or an integer >= 4"),
        ({"accumulator": "half"}, "Invalid accumulator: 'half'. Must be one of"),
        ({"epoch_steps": 0}, "Invalid epoch_steps: 0. Must be None or an integer >= 1"),
        ({"epoch_steps": 1.5}, "Invalid epoch_steps: 1.5"),
        ({"window": 8.0}, "Invalid window: 8.0"),
        ({"window": True}, "Invalid window: True"),
        ({"window": "epoch"}, "Invalid window: 'epoch'"),
        ({"action": "halt"}, r"Invalid action: 'halt'. Must be one of \('stop', 'monitor'\)"),
        ({"restore": "best"}, "Invalid restore: 'best'"),
    ],
)
def test_early_stopping_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        PopRiskEarlyStopping(**arguments)


def test_early_stopping_defaults():
    parameters = inspect.signature(PopRiskEarlyStopping).parameters
    assert {name: p.default for name, p in parameters.items()} == {
        "kappa": 2.0,
        "window": "auto",
        "threshold": 1.0,
        "min_steps": 0,
        "action": "stop",
        "restore": "stop",
        "accumulator": "auto",
        "epoch_steps": None,
    }


def test_thresholds_for_arming_scale_with_the_threshold():
    config = PopRiskEarlyStopping(threshold=2.0)._config
    assert (config.arm_threshold, config.rearm_threshold) == (2.1, 2.6)


def test_state_keys_tell_rules_apart():
    keys = {
        PopRiskEarlyStopping(**arguments).state_key
        for arguments in (
            {},
            {"kappa": 3.0},
            {"window": 9},
            {"threshold": 2.0},
            {"min_steps": 1},
            {"action": "monitor"},
            {"accumulator": "exact"},
            {"epoch_steps": 5},
        )
    }
    assert len(keys) == 8
    assert PopRiskEarlyStopping(restore=None).state_key in keys  # nothing is measured for it


def test_a_fresh_callback_has_nothing_to_report():
    stop = PopRiskEarlyStopping()
    assert (stop.stopped_step, stop.onset_step, stop.best_model_path) == (None, None, "")
    may_be_negative = {"poprisk/risk_decrease", "poprisk/agreement"}
    for name, value in stop.metrics().items():
        assert value == (0.0 if name in may_be_negative else -1.0)
    assert stop.history == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"factor": 1.0}, r"Invalid factor: 1.0. Must be finite and in \(0, 1\)"),
        ({"patience": 0}, "Invalid patience: 0"),
        ({"max_cuts": 0}, "Invalid max_cuts: 0"),
        ({"min_lr": -1e-9}, "Invalid min_lr: -1e-09. Must be finite and >= 0"),
        ({"min_lr": float("nan")}, "Invalid min_lr: nan"),
        ({"window": 3}, "Invalid window: 3"),
    ],
)
def test_lr_cut_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        PopRiskLRCut(**arguments)


def test_lr_cut_defaults():
    parameters = inspect.signature(PopRiskLRCut).parameters
    assert {name: p.default for name, p in parameters.items()} == {
        "factor": 0.3,
        "patience": 2,
        "window": "auto",
        "max_cuts": 3,
        "min_lr": 0.0,
    }


@pytest.mark.parametrize("every_n_steps", [0, -1, 1.5, True, "50"])
def test_monitor_refuses(every_n_steps):
    with pytest.raises(ValueError, match="Invalid every_n_steps"):
        PopRiskMonitor(every_n_steps)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": "open"}, "Invalid gate: 'open'"),
        ({"alpha": "finite"}, "batch_size"),
        ({"alpha": -1.0}, "Invalid alpha"),
        ({"gate_blend": 2.0}, "Invalid gate_blend"),
        ({"state_dtype": "4bit"}, "Invalid state_dtype"),
    ],
)
def test_optimizer_refuses_when_constructed(options, message):
    with pytest.raises(ValueError, match=message):
        PopRiskOptimizer(**options)


def test_optimizer_has_every_option_that_adam_lacks_with_the_same_default():
    adam = {"params", "lr", "betas", "eps", "weight_decay", "maximize", "foreach", "fused"}
    ours = {
        name: p.default
        for name, p in inspect.signature(PopRiskAdamW).parameters.items()
        if name not in adam | {"capturable", "differentiable"}
    }
    theirs = {n: p.default for n, p in inspect.signature(PopRiskOptimizer).parameters.items()}
    assert theirs == ours


@pytest.mark.parametrize(
    "callback", [PopRiskEarlyStopping(), PopRiskLRCut(), PopRiskMonitor(), PopRiskOptimizer()]
)
def test_callbacks_pickle(callback):
    assert type(pickle.loads(pickle.dumps(callback))) is type(callback)

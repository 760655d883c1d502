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
    assert (stop.metrics(), stop.history) == ({}, [])


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


ADAMS = ("lr", "betas", "eps", "weight_decay", "maximize")
ADAMS += ("foreach", "fused", "capturable", "differentiable")


@pytest.mark.parametrize("name", ADAMS)
def test_options_that_stay_adams_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"Invalid {name}: None. PopRiskOptimizer takes it from"):
        PopRiskOptimizer(**{name: None})


def test_command_lines_list_every_other_option_with_its_default():
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(PopRiskOptimizer, "optimizer")
    parameters = list(inspect.signature(PopRiskAdamW).parameters.values())[1:]
    named = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
    ours = {p.name: p.default for p in named if p.name not in ADAMS}
    assert vars(parser.get_defaults().optimizer) == ours


@pytest.mark.parametrize(
    "callback", [PopRiskEarlyStopping(), PopRiskLRCut(), PopRiskMonitor(), PopRiskOptimizer()]
)
def test_callbacks_pickle(callback):
    assert type(pickle.loads(pickle.dumps(callback))) is type(callback)

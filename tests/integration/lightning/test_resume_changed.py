"""Resuming with another setup: training time continues, one warning names what changed."""

import math
import warnings

import pytest
import torch
from torch.utils.data import DataLoader

from poprisk_integrations.lightning import PopRiskEarlyStopping
from tests.integration.lightning import toy
from tests.integration.lightning.test_resume import SaveAt

pytestmark = toy.third_party_warnings

SAVED_AT = 20  # two and a half windows of 8, at lr 1e-2


def fit(root, stops, ckpt_path=None, batch_size=32, callbacks=(), **kwargs):
    """Returns the texts of our own warnings."""
    trainer = toy.trainer(root, [*stops, *callbacks], **{"max_epochs": 4, **kwargs})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(
            toy.Classifier(),
            DataLoader(toy.noisy_data(256, toy.FLIPS), batch_size=batch_size),
            ckpt_path=ckpt_path,
        )
    return [str(w.message) for w in caught if "PopRisk" in str(w.message).split(":")[0]]


@pytest.fixture
def checkpoint(tmp_path):
    saver = SaveAt(tmp_path, SAVED_AT)
    assert fit(tmp_path, [PopRiskEarlyStopping(window=8)], callbacks=[saver]) == []
    return saver.path


def resumed(path, arguments=None, **settings):
    stop = PopRiskEarlyStopping(**{"window": 8, **(arguments or {})})
    said = fit(path.parent, [stop], path, **settings)
    return stop, said


@pytest.mark.parametrize(
    ("arguments", "settings", "named"),
    [
        ({}, {"batch_size": 16}, "epoch_steps 8 -> 16, batch_size 32 -> 16"),
        (
            {},
            {"accumulate_grad_batches": 2, "max_epochs": 8},
            "epoch_steps 8 -> 4, accumulate_grad_batches 1 -> 2",
        ),
        ({"window": 5}, {}, "window_steps 8 -> 5"),
        ({"epoch_steps": 9}, {}, "epoch_steps 8 -> 9"),
    ],
)
def test_another_window_starts_afresh(checkpoint, arguments, settings, named):
    stop, said = resumed(checkpoint, arguments, **settings)
    assert said == [
        f"PopRiskEarlyStopping: resumed with {named}. What was counted so far is kept; the "
        "unfinished window starts afresh."
    ]
    old, new = stop.history[:2], stop.history[2]
    assert [record["step"] for record in old] == [8, 16]
    length = arguments.get("window", 8)
    assert new["step"] == SAVED_AT + length  # no step of the old window in it
    assert new["lr_sum"] == pytest.approx(1e-2 * (SAVED_AT + length))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"kappa": 3.0}, "kappa 2.0 -> 3.0"),
        ({"min_steps": 2}, "min_steps 0 -> 2"),
        ({"threshold": 0.9, "kappa": 1.5}, "kappa 2.0 -> 1.5, threshold 1.0 -> 0.9"),
    ],
)
def test_other_settings_of_the_rule_leave_the_window_alone(checkpoint, arguments, named):
    stop, said = resumed(checkpoint, arguments)
    assert said == [f"PopRiskEarlyStopping: resumed with {named}. What was counted so far is kept."]
    assert [record["step"] for record in stop.history] == [8, 16, 24, 32]


def test_a_stopped_run_is_judged_anew_with_another_kappa(tmp_path):
    saver, first = SaveAt(tmp_path, 45), PopRiskEarlyStopping(window=8)
    fit(tmp_path, [first], callbacks=[saver], max_epochs=20)
    assert first.stopped_step == 45  # the checkpoint is of the stop
    stop, said = resumed(saver.path, {"kappa": 2.5}, max_epochs=20)
    assert len(said) == 1
    onset = first.state_dict()["rule"]["onset_lr_sum"]
    assert stop.stopped_step == math.ceil(2.5 * onset / 1e-2)


def test_what_only_acts_otherwise_says_nothing(checkpoint):
    """A monitor continues from a stop's state."""
    stop, said = resumed(checkpoint, {"action": "monitor"})
    assert said == []
    assert [record["step"] for record in stop.history] == [8, 16, 24, 32]


def test_a_checkpoint_without_the_callback_is_named(tmp_path):
    saver = SaveAt(tmp_path, SAVED_AT)
    fit(tmp_path, [], callbacks=[saver])
    stop, said = resumed(saver.path)
    assert said == [
        "PopRiskEarlyStopping: it knows nothing of the steps before 20; what it counts starts "
        "there."
    ]
    assert stop.history[0]["step"] == SAVED_AT + 8
    assert stop.history[0]["lr_sum"] == pytest.approx(8e-2)


def test_a_state_of_before_the_history_was_kept_still_loads(checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    (key,) = (k for k in content["callbacks"] if k.startswith("PopRisk"))
    for name in ("history", "diagnosis", "setup", "is_open", "reused"):
        del content["callbacks"][key][name]
    torch.save(content, checkpoint)
    stop, said = resumed(checkpoint)
    assert said == []
    assert [record["step"] for record in stop.history] == [24, 32]  # the window is continued


def test_a_stop_and_a_monitor_keep_their_states_apart(tmp_path):
    def both():
        return [
            PopRiskEarlyStopping(window=8),
            PopRiskEarlyStopping(window=8, action="monitor"),
            PopRiskEarlyStopping(window=12, action="monitor"),
        ]

    saver, whole, again = SaveAt(tmp_path, SAVED_AT), both(), both()
    fit(tmp_path, whole, callbacks=[saver])
    assert fit(tmp_path, again, saver.path) == []
    states = torch.load(saver.path, weights_only=True)["callbacks"]
    assert len([key for key in states if key.startswith("PopRiskEarlyStopping(")]) == 3
    for a, b in zip(again, whole, strict=True):
        toy.assert_same(a.state_dict()["rule"]["windows"], b.state_dict()["rule"]["windows"])
    assert [len(stop.history) for stop in again] == [4, 4, 2]

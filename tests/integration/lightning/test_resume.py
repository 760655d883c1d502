"""A resumed run equals an uninterrupted one bitwise; with another setup one warning names it.

In the middle of a window: `tests/integration/test_stop_contract.py`.
"""

import math
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from poprisk_integrations.lightning import PopRiskOptimizer
from tests.integration.frameworks import ResumableLoader
from tests.integration.lightning import toy

pytestmark = toy.third_party_warnings

SAVED_AT = 20  # two and a half windows of 8, at lr 1e-2


def whole_pass(**arguments):
    """A loader of one's own may repeat inside, so the length of a pass is given."""
    return toy.signal(epoch_steps=8, **arguments)


def data():
    return ResumableLoader(toy.noisy_data(256, toy.FLIPS), batch_size=32)


def fit(root, *callbacks, make_optimizer=toy.gated, **settings):
    settings = {"model": toy.Classifier(make_optimizer), "max_epochs": 30, **settings}
    return toy.fit(root, *callbacks, data=data(), **settings)


def optimizer_state(trainer):
    state = trainer.optimizers[0].state_dict()
    for group in state["param_groups"]:
        group.pop("differentiable", None)  # torch adds its default when any state is loaded
    return state


@pytest.mark.parametrize("step", [16, 20, 44])
def test_a_checkpoint_of_a_callback_that_is_called_before_ours(tmp_path, step):
    """Its last step was taken, but not yet counted by us: at a window's end, within, after 32."""
    saver, whole, again = toy.SaveAt(tmp_path, step), whole_pass(), whole_pass()
    fit(tmp_path, saver, whole, make_optimizer=toy.adamw)
    fit(tmp_path, again, make_optimizer=toy.adamw, ckpt_path=saver.path)
    assert again.stopped_step == whole.stopped_step == 45
    toy.assert_same(again.state_dict(), whole.state_dict())


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
def test_a_run_that_had_stopped_stays_stopped(tmp_path):
    saver, first = ModelCheckpoint(tmp_path / "c", filename="last"), whole_pass(kappa=1.2)
    whole = fit(tmp_path, first, saver, enable_checkpointing=True)
    path = saver.best_model_path
    assert first.best_model_path == path  # saved at the epoch's end, at the step of the stop

    again = whole_pass(kappa=1.2)
    resumed = fit(tmp_path, again, ckpt_path=path)
    assert resumed[1].global_step == whole[1].global_step == again.stopped_step
    toy.assert_same(resumed[0].state_dict(), whole[0].state_dict())

    trains_on = whole_pass(kappa=1.2, action="monitor")
    _, longer = fit(tmp_path, trains_on, ckpt_path=path)
    assert longer.current_epoch == 30
    assert trains_on.onset_step == first.onset_step


@pytest.mark.parametrize("make_first", [toy.adamw, toy.gated])
def test_popriskoptimizer_loads_checkpoints_of_adamw_and_of_ours(tmp_path, make_first):
    saver = toy.SaveAt(tmp_path, 16)
    fit(tmp_path, saver, make_optimizer=make_first, max_epochs=2)
    saved = torch.load(saver.path, weights_only=True)["optimizer_states"][0]["state"][0]
    settings = {"make_optimizer": toy.adamw, "ckpt_path": saver.path, "max_epochs": 2}
    _, trainer = fit(tmp_path, PopRiskOptimizer(), **settings)
    state = trainer.optimizers[0].state_dict()["state"][0]  # restored, no step taken
    assert trainer.global_step == 16
    assert type(trainer.optimizers[0]).__name__ == "PopRiskAdamW"
    for key in ("step", "exp_avg", "exp_avg_sq"):
        assert torch.equal(state[key], saved[key])
    assert ("exp_dev_sq" in state) == ("exp_dev_sq" in saved)


def test_popriskoptimizer_resumes_bitwise_with_accumulation(tmp_path):
    """Three of eight micro-batches a step: the last one of an epoch is short."""
    saver, (first, second) = toy.SaveAt(tmp_path, 10), (whole_pass(window=5) for _ in "ab")
    settings = {"accumulate_grad_batches": 3, "max_epochs": 6, "make_optimizer": toy.adamw}
    whole = fit(tmp_path, PopRiskOptimizer(gate="hard"), first, saver, **settings)
    settings["ckpt_path"] = saver.path
    resumed = fit(tmp_path, PopRiskOptimizer(gate="hard"), second, **settings)
    toy.assert_same(resumed[0].state_dict(), whole[0].state_dict())
    toy.assert_same(optimizer_state(resumed[1]), optimizer_state(whole[1]))
    toy.assert_same(second.state_dict(), first.state_dict())


# With another setup.


def said(root, *callbacks, batch_size=32, max_epochs=4, **settings):
    """The texts of our own warnings in a fit with a loader that cannot resume in mid-epoch."""
    data = toy.loader(batch_size=batch_size)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        toy.fit(root, *callbacks, data=data, max_epochs=max_epochs, **settings)
    return [str(w.message) for w in caught if "PopRisk" in str(w.message).split(":")[0]]


@pytest.fixture
def checkpoint(tmp_path):
    saver = toy.SaveAt(tmp_path, SAVED_AT)
    assert said(tmp_path, toy.signal(), saver) == []
    return saver.path


@pytest.mark.parametrize(
    ("arguments", "settings", "named"),
    [
        ({}, {"batch_size": 16}, "epoch_steps 8 -> 16, batch_size 32 -> 16"),
        (
            {},
            {"accumulate_grad_batches": 2, "max_epochs": 8},
            "epoch_steps 8 -> 4, accumulation_steps 1 -> 2",
        ),
        ({"epoch_steps": 9}, {}, "epoch_steps 8 -> 9"),
    ],
)
def test_another_window_starts_afresh(checkpoint, arguments, settings, named):
    stop = toy.signal(**arguments)
    assert said(checkpoint.parent, stop, ckpt_path=checkpoint, **settings) == [
        f"PopRiskEarlyStopping: resumed with {named}. What was counted so far is kept; the "
        "unfinished window starts afresh."
    ]
    assert [record["step"] for record in stop.history[:3]] == [8, 16, SAVED_AT + 8]
    assert stop.history[2]["lr_sum"] == pytest.approx(1e-2 * (SAVED_AT + 8))


def test_a_stopped_run_is_judged_anew_with_another_kappa(tmp_path):
    saver, first, again = toy.SaveAt(tmp_path, 45), toy.signal(), toy.signal(kappa=2.5)
    said(tmp_path, first, saver, max_epochs=20)
    assert first.stopped_step == 45  # the checkpoint is of the stop
    assert len(said(tmp_path, again, ckpt_path=saver.path, max_epochs=20)) == 1
    onset = first.state_dict()["rule"]["onset_lr_sum"]
    assert again.stopped_step == math.ceil(2.5 * onset / 1e-2)


def test_a_checkpoint_without_the_callback_is_named(tmp_path):
    saver, stop = toy.SaveAt(tmp_path, SAVED_AT), toy.signal()
    said(tmp_path, saver)
    assert said(tmp_path, stop, ckpt_path=saver.path) == [
        "PopRiskEarlyStopping: it knows nothing of the steps before 20; what it counts starts "
        "there."
    ]
    assert stop.history[0]["step"] == SAVED_AT + 8
    assert stop.history[0]["lr_sum"] == pytest.approx(8e-2)


def test_a_state_of_before_the_history_was_kept_still_loads(checkpoint):
    content, stop = torch.load(checkpoint, weights_only=True), toy.signal()
    (key,) = (k for k in content["callbacks"] if k.startswith("PopRisk"))
    for name in ("history", "diagnosis", "setup", "reused"):
        del content["callbacks"][key][name]
    torch.save(content, checkpoint)
    assert said(checkpoint.parent, stop, ckpt_path=checkpoint) == []
    assert [record["step"] for record in stop.history] == [24, 32]  # the window is continued


def test_a_stop_and_monitors_keep_their_states_apart(tmp_path):
    def three():
        return [toy.signal(), toy.watch(), toy.watch(window=12)]

    saver, whole, again = toy.SaveAt(tmp_path, SAVED_AT), three(), three()
    said(tmp_path, *whole, saver)
    assert said(tmp_path, *again, ckpt_path=saver.path) == []
    states = torch.load(saver.path, weights_only=True)["callbacks"]
    assert len([key for key in states if key.startswith("PopRiskEarlyStopping(")]) == 3
    for a, b in zip(again, whole, strict=True):
        assert a.state_dict()["rule"]["windows"] == b.state_dict()["rule"]["windows"]
    assert [len(stop.history) for stop in again] == [4, 4, 2]

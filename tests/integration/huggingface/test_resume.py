"""A resumed run equals an uninterrupted one, bitwise: weights, optimizer state, stop state."""

import json
import shutil

import pytest
import torch
import transformers

import poprisk_integrations.huggingface as hf
from poprisk_integrations.huggingface.callbacks.windows import WINDOW_FILE
from tests.helpers.tiny_trainer import arguments, train, weights

pytestmark = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5,
    reason="Trainer itself draws other batches after a resume within an epoch",
)

WINDOW = 8
SAVED = 20  # in the middle of the third window, at whose end (24) the onset comes


def _args(path, **changes):
    # A gate that stays open far enough for training time to pass.
    options = {"num_train_epochs": 16, "save_strategy": "steps", "save_steps": SAVED}
    options["optim_args"] = "alpha=0.02"
    return arguments(path, **{**options, **changes})


def _stop(**options):
    return hf.PopRiskEarlyStoppingCallback(criterion="signal", window=WINDOW, **options)


def _assert_same_run(one, stop_one, other, stop_other):
    assert one.state.global_step == other.state.global_step
    assert stop_one.state() == stop_other.state()
    pairs = [(weights(one.model), weights(other.model))]
    states = [t.optimizer.state_dict()["state"] for t in (one, other)]
    pairs += [(states[0][i], states[1][i]) for i in states[0]]
    assert len(pairs) == 7
    for a, b in pairs:
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run that stops, and its checkpoint at SAVED."""
    path = tmp_path_factory.mktemp("whole")
    stop = _stop()
    trainer = train(_args(path), stop)
    assert stop.stopping_state["onset_step"] > SAVED
    assert stop.stopping_state["stop_step"] == trainer.state.global_step < 128
    return path, trainer, stop


@pytest.fixture
def checkpoint(whole, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(whole[0] / f"checkpoint-{SAVED}", tmp_path / f"checkpoint-{SAVED}")


def test_with_callback_states_restored_by_trainer(whole, checkpoint, tmp_path):
    """Then Trainer replaces our instance by a new one."""
    args = _args(tmp_path, restore_callback_states_from_checkpoint=True)
    resumed = train(args, _stop(kappa=5.0), resume=True)
    (stop,) = [
        c for c in resumed.callback_handler.callbacks if type(c) is hf.PopRiskEarlyStoppingCallback
    ]
    _assert_same_run(whole[1], whole[2], resumed, stop)


def test_a_missing_window_file_warns_and_starts_a_fresh_window(whole, checkpoint, tmp_path, caplog):
    (checkpoint / WINDOW_FILE).unlink()
    stop = _stop()
    resumed = train(_args(tmp_path), stop, resume=True)
    assert caplog.text.count("the unfinished window starts afresh") == 1
    # Windows now end 4 steps later; the training time is that of the whole run.
    rows = stop.history
    assert rows[:2] == whole[2].history[:2]
    assert [row["step"] for row in rows[:4]] == [8, 16, SAVED + 8, SAVED + 16]
    assert rows[2]["lr_sum"] > rows[1]["lr_sum"]
    assert resumed.state.global_step >= SAVED + 16


def test_adding_the_callback_on_resume(tmp_path, caplog):
    """Trainer would fail at the next save: its state has no entry for a new callback."""
    train(_args(tmp_path, max_steps=4, save_steps=4))
    stop = _stop()
    trainer = train(_args(tmp_path, max_steps=8, save_steps=4), stop, resume=True)
    assert trainer.state.global_step == 8
    assert "training time counts from step 4" in caplog.text
    assert stop.stopping_state["lr_sum"] == pytest.approx(4 * 3e-2)
    saved = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    assert "PopRiskEarlyStoppingCallback" in saved["stateful_callbacks"]


def test_resuming_a_stopped_run_stops_again(whole, tmp_path, caplog):
    path, trainer, _ = whole
    last = trainer.state.global_step
    stop = _stop()
    args = _args(tmp_path)
    again = train(args, stop, resume=str(path / f"checkpoint-{last}"))
    assert again.state.global_step == last + 1
    assert f"this run had stopped at step {last}" in caplog.text
    assert stop.stopping_state["stop_step"] == last


def test_with_other_batches(whole, checkpoint, tmp_path, caplog):
    changes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    stop = _stop(action="monitor")
    train(_args(tmp_path, max_steps=SAVED + 14, **changes), stop, resume=True)
    changed = "batch_size 8 -> 4, accumulation_steps 1 -> 2"
    message = f"resumed with {changed}. What was counted so far is kept; the unfinished window "
    assert caplog.text.count(message) == 1
    assert caplog.text.count("afresh") == 1
    before, rows = whole[2].history[:2], stop.history
    assert rows[:2] == before
    assert [row["step"] for row in rows[2:]] == [SAVED + WINDOW]
    assert rows[2]["lr_sum"] > before[1]["lr_sum"]

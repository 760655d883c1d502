"""The stop in real runs: when, what is kept, what is said."""

import dataclasses
import json

import pytest
import torch
import transformers
from transformers import Trainer, TrainerCallback

import poprisk_integrations.huggingface as hf
from tests.helpers.tiny_trainer import TinyModel, Tracker, arguments, dataset, train, weights


class _Snapshots(TrainerCallback):
    """Weights after every step."""

    def __init__(self):
        self.at = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.at[state.global_step] = weights(model)


SAVING = {"save_strategy": "steps", "save_steps": 10}


def _stop(**options):
    return hf.PopRiskEarlyStoppingCallback(**{"criterion": "signal", "window": 8, **options})


def _args(tmp_path, **changes):
    options = {"optim": "adamw_torch", "num_train_epochs": 16, "max_grad_norm": 0.0}
    return arguments(tmp_path, **{**options, **changes})


def _report(tmp_path):
    assert not list(tmp_path.glob("*.tmp*"))
    return json.loads((tmp_path / "poprisk_stop.json").read_text())


@pytest.fixture(scope="module")
def onset_stop(tmp_path_factory):
    """(onset step, stop step) of AdamW with window=8, from a run that goes on past both."""
    callback = _stop(action="monitor")
    trainer = train(_args(tmp_path_factory.mktemp("reference")), callback)
    state = callback.stopping_state
    assert 16 < state["onset_step"] < state["stop_step"] < trainer.state.global_step
    return state["onset_step"], state["stop_step"]


def _equal(one, other):
    return all(torch.equal(one[n], other[n]) for n in one)


def test_onset_and_stop_are_logged_when_they_happen(tmp_path, onset_stop):
    tracker = Tracker()
    options = {"logging_strategy": "steps", "logging_steps": 1000}
    train(
        _args(tmp_path / "on", **options),
        tracker,
        _stop(),
    )
    assert [line.get("poprisk/onset_step") for line in tracker.lines] == [onset_stop[0]] * 3
    assert all(line["poprisk/predicted_stop_step"] == onset_stop[1] for line in tracker.lines)
    silent = Tracker()
    args = _args(tmp_path / "off", logging_strategy="no")
    train(args, silent, _stop())
    assert ["train_loss" in line for line in silent.lines] == [True]


@pytest.mark.parametrize("restore", ["stop", "onset"])
def test_best_checkpoint_without_an_eval_set(tmp_path, onset_stop, restore):
    onset, stop = onset_stop
    best = {"stop": stop, "onset": onset}[restore]
    snapshots = _Snapshots()
    callback = _stop(restore=restore)
    args = _args(tmp_path, save_strategy="best", load_best_model_at_end=True)
    trainer = train(args, callback, snapshots)
    assert trainer.state.global_step == stop
    assert trainer.state.best_global_step == best
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert trainer.state.best_metric is None  # a field that Trainer compares with its own metrics
    assert _equal(weights(trainer.model), snapshots.at[best])
    assert not _equal(snapshots.at[onset], snapshots.at[stop])
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{best}"]
    assert _report(tmp_path)["best_model_checkpoint"] == str(tmp_path / f"checkpoint-{best}")


@pytest.mark.filterwarnings("ignore:mtime may not be reliable:UserWarning")  # transformers <= 5.0
@pytest.mark.parametrize("restore", ["best", None])
def test_the_stop_is_saved_under_any_save_strategy_and_survives_rotation(
    tmp_path, onset_stop, restore
):
    """Unless nothing is to be kept."""
    args = _args(tmp_path, save_strategy="steps", save_steps=20, save_total_limit=1)
    trainer = train(args, _stop(restore=restore))
    last = onset_stop[1] if restore else onset_stop[1] // 20 * 20
    assert trainer.state.global_step == onset_stop[1]
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{last}"]
    assert trainer.state.best_global_step == (last if restore else None)


def test_an_onset_that_is_taken_back_is_not_the_best(tmp_path):
    callback = _stop(kappa=4.0, restore="onset")
    ratios = iter([2.0, 0.5, 2.0, 2.0, 2.0])  # onset at 16, forgotten at 32
    args = _args(tmp_path, num_train_epochs=5, save_strategy="best", load_best_model_at_end=True)
    snapshots = _Snapshots()
    trainer = Trainer(
        model=TinyModel(), args=args, train_dataset=dataset(), callbacks=[callback, snapshots]
    )
    _script(callback, ratios)
    trainer.train()
    assert "by step 32 batches agreed again" in callback.stopping_state["reason"]
    assert trainer.state.best_global_step is None
    assert _equal(weights(trainer.model), snapshots.at[40])


def _script(callback, ratios):
    """Let the callback's windows close with given values of F."""
    begin = callback.on_train_begin

    def on_train_begin(*args, **kwargs):
        begin(*args, **kwargs)
        window = callback._part.reader.window
        close = window.close
        window.close = lambda: dataclasses.replace(close(), ratio=next(ratios))

    callback.on_train_begin = on_train_begin


def test_evaluation_keeps_its_own_best(tmp_path, onset_stop):
    """Where an eval metric picks the best checkpoint, the stop only stops and saves."""
    args = _args(
        tmp_path,
        eval_strategy="steps",
        eval_steps=8,
        save_strategy="steps",
        save_steps=8,
        load_best_model_at_end=True,
    )
    callback = _stop()
    trainer = train(args, callback, eval_dataset=dataset(noise=0.0))
    stop = onset_stop[1]
    assert trainer.state.global_step == stop
    best = min(
        (x for x in trainer.state.log_history if "eval_loss" in x), key=lambda x: x["eval_loss"]
    )
    assert trainer.state.best_global_step == best["step"] != stop
    assert not any(k.startswith("poprisk/") for k in best)
    assert (tmp_path / f"checkpoint-{stop}").is_dir()


def test_a_second_run_of_the_same_trainer_starts_afresh(tmp_path):
    callback = _stop()
    trainer = train(_args(tmp_path), callback)
    first = callback.stopping_state
    trainer.model.load_state_dict(TinyModel().state_dict())
    trainer.optimizer = None
    trainer.train()
    assert callback.stopping_state == first


# A monitor beside the stop: kept apart in logs, reports and checkpoints.


def _pair():
    return _stop(), _stop(window=5, kappa=1.0, action="monitor")


def test_two_that_stop_are_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="'stop' in two PopRiskEarlyStoppingCallbacks"):
        train(_args(tmp_path), _stop(), _stop(window=16))
    assert not list(tmp_path.glob("*.json"))


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A run with both, that saves every ten steps."""
    path, tracker, pair = tmp_path_factory.mktemp("both"), Tracker(), _pair()
    trainer = train(_args(path, **SAVING), tracker, *pair)
    return path, trainer, tracker, pair


def test_a_monitor_beside_the_stop(tmp_path, both, onset_stop):
    path, trainer, tracker, (_, monitor) = both
    alone = _pair()[1]
    train(_args(tmp_path), alone)
    assert trainer.state.global_step == onset_stop[1]
    assert tracker.lines[-1]["poprisk/onset_step"] == onset_stop[0]
    assert tracker.lines[-1]["poprisk/2/onset_step"] == monitor.stopping_state["onset_step"]
    reports = [json.loads((path / f"poprisk_stop{n}.json").read_text()) for n in ("", "_2")]
    assert [r["window_steps"] for r in reports] == [8, 5]
    assert [r["stopped"] for r in reports] == [True, False]
    assert reports[1]["history"] == alone.history[: len(monitor.history)]


@pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5,
    reason="Trainer itself draws other batches after a resume within an epoch",
)
def test_both_resume_and_the_checkpoint_does_not_grow(tmp_path, both):
    path, resumed = both[0] / "checkpoint-30", _pair()
    state = json.loads((path / "trainer_state.json").read_text())
    assert len(state["stateful_callbacks"]["PopRiskEarlyStoppingCallback"]) == 2
    train(_args(tmp_path, **SAVING), *resumed, resume=str(path))
    assert [c.state() for c in resumed] == [c.state() for c in both[3]]

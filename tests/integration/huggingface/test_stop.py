"""The stop in real runs: when, what is kept, what is said."""

import json

import pytest
import torch
from transformers import Trainer, TrainerCallback

import poprisk_integrations.huggingface as hf
from tests.helpers.tiny_trainer import TinyModel, arguments, dataset, train, weights

ONSET, STOP = 32, 64  # of AdamW with the arguments of the helper and window=8


class _Snapshots(TrainerCallback):
    """Weights after every step."""

    def __init__(self):
        self.at = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.at[state.global_step] = weights(model)


def _args(tmp_path, **changes):
    return arguments(tmp_path, **{"optim": "adamw_torch", "num_train_epochs": 12, **changes})


def _report(tmp_path):
    assert not list(tmp_path.glob("*.tmp"))
    return json.loads((tmp_path / "poprisk_stop.json").read_text())


def _equal(one, other):
    return all(torch.equal(one[n], other[n]) for n in one)


def test_stops_at_kappa_times_the_onset_and_says_why(tmp_path, capsys):
    callback = hf.PopRiskEarlyStoppingCallback(window="auto")  # an epoch: 8 steps
    trainer = train(_args(tmp_path), callback)
    assert trainer.state.global_step == STOP
    line = [x for x in capsys.readouterr().err.splitlines() if x.startswith("poprisk: ")]
    assert line == [f"poprisk: {callback.stopping_state['reason']}"]
    assert f"stopped at step {STOP}" in line[0]
    assert f"step {ONSET} (F = " in line[0]
    report = _report(tmp_path)
    assert (report["stopped"], report["stop_step"], report["onset_step"]) == (True, STOP, ONSET)
    assert report["reason"] == callback.stopping_state["reason"]
    assert (report["window_steps"], report["settings"]["window"]) == (8, "auto")
    assert not list(tmp_path.glob("checkpoint-*"))  # save_strategy="no"


def test_numbers_in_the_history(tmp_path):
    trainer = train(_args(tmp_path), hf.PopRiskEarlyStoppingCallback(window=8))
    history = {line["step"]: line for line in trainer.state.log_history}
    assert "poprisk/signal_ratio" not in history[4]
    assert history[8]["poprisk/signal_ratio"] > 1.5
    assert "poprisk/onset_step" not in history[ONSET - 4]
    for step in (ONSET, ONSET + 4):
        assert history[step]["poprisk/signal_ratio"] < 1
        assert history[step]["poprisk/onset_step"] == ONSET
        assert history[step]["poprisk/predicted_stop_step"] == STOP
    assert "train_loss" in trainer.state.log_history[-1]
    assert trainer.state.log_history[-1]["poprisk/predicted_stop_step"] == STOP


def test_kappa_one_stops_at_the_onset(tmp_path):
    trainer = train(_args(tmp_path), hf.PopRiskEarlyStoppingCallback(kappa=1.0, window=8))
    assert trainer.state.global_step == ONSET


def test_min_steps_holds_the_stop_back(tmp_path):
    trainer = train(_args(tmp_path), hf.PopRiskEarlyStoppingCallback(window=8, min_steps=70))
    assert trainer.state.global_step == 70


@pytest.mark.parametrize("optim", ["poprisk_adamw", "adafactor"])
def test_works_with_any_optimizer(tmp_path, optim):
    callback = hf.PopRiskEarlyStoppingCallback(window=8)
    trainer = train(_args(tmp_path, optim=optim, num_train_epochs=20), callback)
    assert callback.stopping_state["stop_step"] == trainer.state.global_step < 160


def test_monitor_leaves_the_run_alone(tmp_path, capsys):
    """Bitwise, to the end, and with Trainer's own idea of the best model."""
    options = {"optim": "poprisk_adamw", "num_train_epochs": 14, "save_strategy": "steps"}
    plain = train(_args(tmp_path / "plain", save_steps=50, **options))
    callback = hf.PopRiskEarlyStoppingCallback(window=8, action="monitor")
    watched = train(_args(tmp_path / "watched", save_steps=50, **options), callback)
    assert callback.stopping_state["stop_step"] is not None
    assert watched.state.global_step == plain.state.global_step == 112
    assert _equal(weights(plain.model), weights(watched.model))
    for one, other in zip(
        plain.optimizer.state_dict()["state"].values(),
        watched.optimizer.state_dict()["state"].values(),
        strict=True,
    ):
        assert _equal(one, other)
    losses = [[x["loss"] for x in t.state.log_history if "loss" in x] for t in (plain, watched)]
    assert losses[0] == losses[1]
    assert watched.state.best_global_step is None
    assert watched.state.best_model_checkpoint is None
    assert {p.name for p in (tmp_path / "watched").glob("checkpoint-*")} == {
        p.name for p in (tmp_path / "plain").glob("checkpoint-*")
    }
    assert "poprisk: would have stopped at step" in capsys.readouterr().err
    assert _report(tmp_path / "watched")["stopped"] is False


@pytest.mark.parametrize(("restore", "best"), [("stop", STOP), ("onset", ONSET)])
def test_best_checkpoint_without_an_eval_set(tmp_path, restore, best):
    snapshots = _Snapshots()
    callback = hf.PopRiskEarlyStoppingCallback(window=8, restore=restore)
    args = _args(tmp_path, save_strategy="best", load_best_model_at_end=True)
    trainer = train(args, callback, snapshots)
    assert trainer.state.global_step == STOP
    assert trainer.state.best_global_step == best
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert isinstance(trainer.state.best_metric, float)
    assert _equal(weights(trainer.model), snapshots.at[best])
    assert not _equal(snapshots.at[ONSET], snapshots.at[STOP])
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{best}"]
    assert _report(tmp_path)["best_model_checkpoint"] == str(tmp_path / f"checkpoint-{best}")


def test_the_stop_is_saved_under_any_save_strategy_and_survives_rotation(tmp_path):
    args = _args(tmp_path, save_strategy="steps", save_steps=20, save_total_limit=1)
    trainer = train(args, hf.PopRiskEarlyStoppingCallback(window=8))
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{STOP}"]
    assert trainer.state.best_global_step == STOP


def test_restore_none_marks_and_saves_nothing(tmp_path):
    args = _args(tmp_path, save_strategy="steps", save_steps=500)
    trainer = train(args, hf.PopRiskEarlyStoppingCallback(window=8, restore=None))
    assert trainer.state.global_step == STOP
    assert trainer.state.best_global_step is None
    assert not list(tmp_path.glob("checkpoint-*"))


def test_an_onset_that_is_taken_back_is_not_the_best(tmp_path):
    callback = hf.PopRiskEarlyStoppingCallback(window=8, restore="onset")
    ratios = iter([2.0, 0.5, 2.0, 2.0, 2.0])  # onset at 16, forgotten at 32
    args = _args(tmp_path, num_train_epochs=5, save_strategy="best", load_best_model_at_end=True)
    snapshots = _Snapshots()
    trainer = Trainer(
        model=TinyModel(), args=args, train_dataset=dataset(), callbacks=[callback, snapshots]
    )
    _script(callback, ratios)
    trainer.train()
    assert "onset forgotten at step 32" in callback.stopping_state["reason"]
    assert trainer.state.best_global_step is None
    assert _equal(weights(trainer.model), snapshots.at[40])


def _script(callback, ratios):
    """Let the callback's windows close with given values of F."""
    begin = callback.on_train_begin

    def on_train_begin(*args, **kwargs):
        begin(*args, **kwargs)
        close = callback._window.close

        def scripted():
            return type(close())(ratio=next(ratios), per_tensor=None, noise=None, steps=8)

        callback._window.close = scripted

    callback.on_train_begin = on_train_begin


def test_evaluation_keeps_its_own_best(tmp_path):
    """Where an eval metric picks the best checkpoint, the stop only stops and saves."""
    args = _args(
        tmp_path,
        eval_strategy="steps",
        eval_steps=8,
        save_strategy="steps",
        save_steps=8,
        load_best_model_at_end=True,
    )
    callback = hf.PopRiskEarlyStoppingCallback(window=8)
    trainer = train(args, callback, eval_dataset=dataset(noise=0.0))
    assert trainer.state.global_step == STOP
    best = min(
        (x for x in trainer.state.log_history if "eval_loss" in x), key=lambda x: x["eval_loss"]
    )
    assert trainer.state.best_global_step == best["step"] != STOP
    assert not any(k.startswith("poprisk/") for k in best)
    assert (tmp_path / f"checkpoint-{STOP}").is_dir()


def test_nan_gradients_do_not_crash_or_stop(tmp_path, caplog):
    data = dataset()
    for row in data:
        row["labels"] = row["labels"] * float("nan")
    callback = hf.PopRiskEarlyStoppingCallback(window=8)
    trainer = train(arguments(tmp_path, num_train_epochs=3), callback, train_dataset=data)
    assert trainer.state.global_step == 24
    assert callback.stopping_state["windows"] == 0
    assert caplog.text.count("does not count") == 1
    assert _report(tmp_path)["reason"] == "no window is complete yet"


def test_fewer_examples_than_a_batch(tmp_path, caplog):
    callback = hf.PopRiskEarlyStoppingCallback()
    trainer = train(_args(tmp_path, num_train_epochs=3), callback, train_dataset=dataset(4))
    assert trainer.state.global_step == 3
    assert caplog.text.count("it can never stop early") == 1


def test_a_second_run_of_the_same_trainer_starts_afresh(tmp_path):
    callback = hf.PopRiskEarlyStoppingCallback(window=8)
    trainer = train(_args(tmp_path), callback)
    first = callback.stopping_state
    trainer.model.load_state_dict(TinyModel().state_dict())
    trainer.optimizer = None
    trainer.train()
    assert callback.stopping_state == first


class _Tracker(TrainerCallback):
    """Sees what W&B or TensorBoard would see: it comes before the user's callbacks."""

    def __init__(self):
        self.lines = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.lines.append(dict(logs))


class _MixedIn(hf.PopRiskTrainerMixin, Trainer):
    pass


@pytest.mark.parametrize(("cls", "seen"), [(Trainer, False), (_MixedIn, True)])
def test_trackers_see_the_numbers_through_the_mixin(tmp_path, cls, seen):
    tracker, monitor = _Tracker(), hf.PopRiskMonitorCallback(every_n_steps=1)
    stop = hf.PopRiskEarlyStoppingCallback(window=8)
    args = arguments(tmp_path)
    trainer = train(args, tracker, stop, monitor, cls=cls)
    for key in ("poprisk/signal_ratio", "poprisk/open_fraction"):
        assert any(key in line for line in tracker.lines) is seen
        assert any(key in line for line in trainer.state.log_history)

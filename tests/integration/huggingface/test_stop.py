"""The stop in real runs: when, what is kept, what is said."""

import dataclasses
import json
import math

import pytest
import torch
from transformers import Trainer, TrainerCallback

import poprisk_integrations.huggingface as hf
from tests.helpers.tiny_trainer import TinyModel, arguments, dataset, train, weights


class _Snapshots(TrainerCallback):
    """Weights after every step."""

    def __init__(self):
        self.at = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.at[state.global_step] = weights(model)


def _args(tmp_path, **changes):
    options = {"optim": "adamw_torch", "num_train_epochs": 16, "max_grad_norm": 0.0}
    return arguments(tmp_path, **{**options, **changes})


def _report(tmp_path):
    assert not list(tmp_path.glob("*.tmp*"))
    return json.loads((tmp_path / "poprisk_stop.json").read_text())


@pytest.fixture(scope="module")
def onset_stop(tmp_path_factory):
    """(onset step, stop step) of AdamW with window=8, from a run that goes on past both."""
    callback = hf.PopRiskEarlyStoppingCallback(window=8, action="monitor")
    trainer = train(_args(tmp_path_factory.mktemp("reference")), callback)
    state = callback.stopping_state
    assert 16 < state["onset_step"] < state["stop_step"] < trainer.state.global_step
    return state["onset_step"], state["stop_step"]


def _equal(one, other):
    return all(torch.equal(one[n], other[n]) for n in one)


def test_stops_at_kappa_times_the_onset_and_says_why(tmp_path, capsys):
    callback = hf.PopRiskEarlyStoppingCallback(window="auto")  # an epoch: 8 steps
    trainer = train(_args(tmp_path), callback)
    stop = trainer.state.global_step
    report = _report(tmp_path)
    assert (report["stopped"], report["stop_step"]) == (True, stop)
    assert (report["window_steps"], report["settings"]["window"]) == (8, "auto")
    # By hand from the report's own windows: where the line through log F crosses 0.
    rows = report["history"]
    after = next(i for i, row in enumerate(rows) if row["signal_ratio"] < 1)
    assert report["onset_step"] == rows[after]["step"] == 8 * (after + 1)
    before, ratio = (math.log(rows[after + k]["signal_ratio"]) for k in (-1, 0))
    onset = 3e-2 * (8 * after - 4 + 8 * before / (before - ratio))
    assert report["onset_lr_sum"] == pytest.approx(onset, rel=1e-6)
    fall = max(row["noise"] for row in rows[: after + 1]) / rows[after]["noise"]
    kappa = 2 * min(fall, 1.5)
    assert report["onset_kappa"] == pytest.approx(kappa)
    assert 3e-2 * (stop - 1) < kappa * onset <= 3e-2 * stop * (1 + 1e-6)
    line = [x for x in capsys.readouterr().err.splitlines() if x.startswith("poprisk: ")]
    assert line[1:] == [f"poprisk: {report['reason']}; {report['diagnosis']}"]
    assert "one pass over the data is 8 steps; memorising can be noticed from step 16" in line[0]
    assert f"stopped at step {stop}" in line[1]
    assert f"noticed at step {report['onset_step']}, F = " in line[1]
    assert "memorising: " in line[1]
    assert not list(tmp_path.glob("checkpoint-*"))  # save_strategy="no"


def test_the_report_has_a_row_per_window(tmp_path):
    callback = hf.PopRiskEarlyStoppingCallback(window=8)
    last = train(_args(tmp_path), callback).state.global_step
    rows = _report(tmp_path)["history"]
    assert [row["step"] for row in rows] == list(range(8, last + 1, 8))
    assert [row["reused"] for row in rows] == [False] + [True] * (len(rows) - 1)
    names = ("signal_ratio", "risk_decrease", "agreement")
    keys = {"step", "lr_sum", "noise", "steps", "reused", *names, *(f"{n}_se" for n in names)}
    for row in rows:
        assert row.keys() == keys
        assert row["lr_sum"] == pytest.approx(3e-2 * row["step"])
        assert row["noise"] > 0
    # Learning at first, and its direction is that of the next batch too.
    assert rows[0]["risk_decrease"] > 2 * rows[0]["risk_decrease_se"]
    assert rows[0]["agreement"] > 2 * rows[0]["agreement_se"]


def test_numbers_in_the_history(tmp_path, onset_stop):
    onset, stop = onset_stop
    trainer = train(_args(tmp_path), hf.PopRiskEarlyStoppingCallback(window=8))
    history = {line["step"]: line for line in trainer.state.log_history}
    assert "poprisk/signal_ratio" not in history[4]
    assert history[8]["poprisk/signal_ratio"] > 1.5
    assert "poprisk/onset_step" not in history[onset - 4]
    for step in (onset, onset + 4, stop):
        assert history[step]["poprisk/signal_ratio"] < 1
        assert history[step]["poprisk/onset_step"] == onset
        assert history[step]["poprisk/predicted_stop_step"] == stop
    for name in ("signal_ratio_se", "risk_decrease", "risk_decrease_se", "agreement_se"):
        assert isinstance(history[onset][f"poprisk/{name}"], float)
    assert "train_loss" in trainer.state.log_history[-1]
    assert trainer.state.log_history[-1]["poprisk/predicted_stop_step"] == stop


def test_onset_and_stop_are_logged_when_they_happen(tmp_path, onset_stop):
    tracker = _Tracker()
    options = {"logging_strategy": "steps", "logging_steps": 1000}
    train(_args(tmp_path / "on", **options), tracker, hf.PopRiskEarlyStoppingCallback(window=8))
    assert [line.get("poprisk/onset_step") for line in tracker.lines] == [onset_stop[0]] * 3
    assert all(line["poprisk/predicted_stop_step"] == onset_stop[1] for line in tracker.lines)
    silent = _Tracker()
    args = _args(tmp_path / "off", logging_strategy="no")
    train(args, silent, hf.PopRiskEarlyStoppingCallback(window=8))
    assert ["train_loss" in line for line in silent.lines] == [True]


def test_min_steps_holds_the_stop_back(tmp_path, onset_stop):
    later = onset_stop[1] + 6
    trainer = train(_args(tmp_path), hf.PopRiskEarlyStoppingCallback(window=8, min_steps=later))
    assert trainer.state.global_step == later


def test_one_pass_over_the_data_never_stops(tmp_path):
    """Without a signal F < 1 from the start, but no example is seen twice."""
    data = dataset(640)
    for row in data:
        row["labels"] = torch.randn(())
    options = {"num_train_epochs": 1, "max_steps": 80}
    callback = hf.PopRiskEarlyStoppingCallback(kappa=1.0, window=8)
    trainer = train(_args(tmp_path / "one", **options), callback, train_dataset=data)
    assert trainer.state.global_step == 80
    assert callback.stopping_state["mean_ratio"] < 1
    # The same data, said to repeat after two windows.
    callback = hf.PopRiskEarlyStoppingCallback(kappa=1.0, window=8, epoch_steps=16)
    trainer = train(_args(tmp_path / "two", **options), callback, train_dataset=data)
    assert trainer.state.global_step < 80


class _Stream(torch.utils.data.IterableDataset):
    """Data without a length."""

    def __iter__(self):
        return iter(dataset())


def test_streams_count_as_one_pass_unless_the_user_says_otherwise(tmp_path, caplog):
    """Nothing shows whether a stream that Trainer starts again brings the same examples."""
    reused = {}
    for epoch_steps in (None, 8):
        stop = hf.PopRiskEarlyStoppingCallback(window=6, action="monitor", epoch_steps=epoch_steps)
        args = _args(tmp_path / str(epoch_steps), max_steps=24)
        train(args, stop, train_dataset=_Stream())
        reused[epoch_steps] = [row["reused"] for row in stop.progress.history]
    # The window of steps 7 to 12 began in the first pass of 8 steps.
    assert reused == {None: [False] * 4, 8: [False, False, True, True]}
    assert caplog.text.count("set epoch_steps to the optimizer steps of one pass") == 1


@pytest.mark.parametrize("optim", ["poprisk_adamw", "adafactor"])
def test_works_with_any_optimizer(tmp_path, optim):
    callback = hf.PopRiskEarlyStoppingCallback(window=8)
    trainer = train(_args(tmp_path, optim=optim, num_train_epochs=30), callback)
    assert callback.stopping_state["stop_step"] == trainer.state.global_step < 240


def test_monitor_leaves_the_run_alone(tmp_path, capsys):
    """Bitwise, to the end, and with Trainer's own idea of the best model."""
    options = {"optim": "adamw_torch", "num_train_epochs": 14, "save_strategy": "steps"}
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


@pytest.mark.parametrize("restore", ["stop", "onset"])
def test_best_checkpoint_without_an_eval_set(tmp_path, onset_stop, restore):
    onset, stop = onset_stop
    best = {"stop": stop, "onset": onset}[restore]
    snapshots = _Snapshots()
    callback = hf.PopRiskEarlyStoppingCallback(window=8, restore=restore)
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
def test_the_stop_is_saved_under_any_save_strategy_and_survives_rotation(tmp_path, onset_stop):
    stop = onset_stop[1]
    args = _args(tmp_path, save_strategy="steps", save_steps=20, save_total_limit=1)
    trainer = train(args, hf.PopRiskEarlyStoppingCallback(window=8))
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{stop}"]
    assert trainer.state.best_global_step == stop


def test_restore_none_marks_and_saves_nothing(tmp_path, onset_stop):
    args = _args(tmp_path, save_strategy="steps", save_steps=500)
    trainer = train(args, hf.PopRiskEarlyStoppingCallback(window=8, restore=None))
    assert trainer.state.global_step == onset_stop[1]
    assert trainer.state.best_global_step is None
    assert not list(tmp_path.glob("checkpoint-*"))


def test_an_onset_that_is_taken_back_is_not_the_best(tmp_path):
    callback = hf.PopRiskEarlyStoppingCallback(kappa=4.0, window=8, restore="onset")
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
        window = callback._reader.window
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
    callback = hf.PopRiskEarlyStoppingCallback(window=8)
    trainer = train(args, callback, eval_dataset=dataset(noise=0.0))
    stop = onset_stop[1]
    assert trainer.state.global_step == stop
    best = min(
        (x for x in trainer.state.log_history if "eval_loss" in x), key=lambda x: x["eval_loss"]
    )
    assert trainer.state.best_global_step == best["step"] != stop
    assert not any(k.startswith("poprisk/") for k in best)
    assert (tmp_path / f"checkpoint-{stop}").is_dir()


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


def test_fewer_examples_than_a_batch(tmp_path, caplog, capsys):
    callback = hf.PopRiskEarlyStoppingCallback()
    trainer = train(_args(tmp_path, num_train_epochs=3), callback, train_dataset=dataset(4))
    assert trainer.state.global_step == 3
    assert caplog.text.count("each step takes all the data") == 1
    assert "poprisk: did not stop this run; no window is complete yet" in capsys.readouterr().err


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


@pytest.mark.parametrize("where", ["before", "after"])
def test_trackers_see_the_numbers(tmp_path, where):
    """Trackers of `report_to` come first of all; a user's own may come last."""
    tracker, monitor = _Tracker(), hf.PopRiskMonitorCallback(every_n_steps=1)
    ours = [hf.PopRiskEarlyStoppingCallback(window=8), monitor]
    callbacks = [tracker, *ours] if where == "before" else [*ours, tracker]
    trainer = train(arguments(tmp_path), *callbacks)
    for key in ("poprisk/signal_ratio", "poprisk/open_fraction"):
        assert any(key in line for line in tracker.lines)
        assert any(key in line for line in trainer.state.log_history)

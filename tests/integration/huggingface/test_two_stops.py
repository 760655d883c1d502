"""A monitor beside the stop: kept apart in logs, reports and checkpoints."""

import json

import pytest
import transformers
from transformers import TrainerCallback

import poprisk_integrations.huggingface as hf
from tests.helpers.tiny_trainer import arguments, train

SAVED = 30


class _Lines(TrainerCallback):
    def __init__(self):
        self.lines = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.lines.append(dict(logs))


def _args(path, **changes):
    options = {"optim": "adamw_torch", "num_train_epochs": 16, "max_grad_norm": 0.0}
    return arguments(path, **{**options, **changes})


def _pair():
    return (
        hf.PopRiskEarlyStoppingCallback(window=8),
        hf.PopRiskEarlyStoppingCallback(window=5, kappa=1.0, action="monitor"),
    )


def test_two_that_stop_are_refused_before_training(tmp_path):
    stops = [hf.PopRiskEarlyStoppingCallback(window=w) for w in (8, 16)]
    with pytest.raises(ValueError, match="'stop' in two PopRiskEarlyStoppingCallbacks"):
        train(_args(tmp_path), *stops)
    assert not list(tmp_path.glob("*.json"))


def test_a_monitor_beside_the_stop(tmp_path):
    alone = {}
    for name, callback in zip(("stop", "monitor"), _pair(), strict=True):
        trainer = train(_args(tmp_path / name), callback)
        alone[name] = (callback.state(), trainer.state.global_step)
    tracker, (stop, monitor) = _Lines(), _pair()
    trainer = train(_args(tmp_path / "both"), tracker, stop, monitor)
    assert trainer.state.global_step == alone["stop"][1]
    assert stop.state() == alone["stop"][0]
    line = tracker.lines[-1]
    assert line["poprisk/onset_step"] == stop.stopping_state["onset_step"]
    assert line["poprisk/2/onset_step"] == monitor.stopping_state["onset_step"]
    reports = [
        json.loads((tmp_path / "both" / f"poprisk_stop{n}.json").read_text()) for n in ("", "_2")
    ]
    assert [r["window_steps"] for r in reports] == [8, 5]
    assert [r["stopped"] for r in reports] == [True, False]
    common = len(reports[1]["history"])
    theirs = json.loads((tmp_path / "monitor" / "poprisk_stop.json").read_text())["history"]
    assert reports[1]["history"] == theirs[:common]


@pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5,
    reason="Trainer itself draws other batches after a resume within an epoch",
)
def test_both_resume_and_the_checkpoint_does_not_grow(tmp_path):
    options = {"save_strategy": "steps", "save_steps": SAVED // 3}
    whole = _pair()
    train(_args(tmp_path, **options), *whole)
    state = json.loads((tmp_path / f"checkpoint-{SAVED}" / "trainer_state.json").read_text())
    assert len(state["stateful_callbacks"]["PopRiskEarlyStoppingCallback"]) == 2
    resumed = _pair()
    args = _args(tmp_path / "resumed", **options)
    train(args, *resumed, resume=str(tmp_path / f"checkpoint-{SAVED}"))
    assert [c.state() for c in resumed] == [c.state() for c in whole]

"""Which stop a DPO run has, on which windows, and that it ends the run."""

import json
from pathlib import Path
from typing import Any

import pytest

from poprisk_integrations.huggingface import PopRiskEarlyStoppingCallback
from poprisk_integrations.optim import PopRiskAdamW
from tests.helpers.tiny_dpo import dpo_trainer, pairs


def stops(trainer: Any) -> list[PopRiskEarlyStoppingCallback]:
    callbacks = trainer.callback_handler.callbacks
    return [c for c in callbacks if isinstance(c, PopRiskEarlyStoppingCallback)]


def stop_file(output_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output_dir / "poprisk_stop.json").read_text())
    return found


def test_optimizer_and_stop_by_default(tmp_path: Path) -> None:
    trainer = dpo_trainer(tmp_path, max_steps=16)
    assert len(stops(trainer)) == 1
    trainer.train()
    assert stops(trainer)[0].criterion_in_use == "risk"
    assert type(trainer.optimizer.optimizer) is PopRiskAdamW


ACCUMULATED = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 1}


@pytest.mark.parametrize(
    ("count", "options", "window"),
    [
        (16, {"max_steps": 16}, 8),  # a third of an epoch of 4 steps, at least 8
        (60, ACCUMULATED, 10),  # of 60 micro-batches, 30 optimizer steps
        (60, {"stop_window": 7, **ACCUMULATED}, 7),
    ],
)
def test_window(tmp_path: Path, count: int, options: dict[str, Any], window: int) -> None:
    dpo_trainer(tmp_path, pairs(count), stop_criterion="signal", **options).train()
    assert stop_file(tmp_path)["window_steps"] == window


@pytest.mark.parametrize("form", ["off", "given", "added", "added as a class"])
def test_a_stop_of_the_user_s_takes_the_place_of_ours(tmp_path: Path, form: str) -> None:
    given = PopRiskEarlyStoppingCallback(window=5)
    callbacks = [given] if form == "given" else None
    trainer = dpo_trainer(tmp_path, stop=form != "off", callbacks=callbacks, max_steps=2)
    if form.startswith("added"):
        trainer.add_callback(PopRiskEarlyStoppingCallback if "class" in form else given)
    trainer.train()
    if form == "off":
        assert stops(trainer) == []
    else:
        (found,) = stops(trainer)
        assert found is given or form == "added as a class"


def test_stop_ends_the_run_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = dpo_trainer(
        tmp_path, max_steps=200, learning_rate=3e-3, stop_criterion="signal", stop_window=4,
        save_strategy="steps", save_steps=500, optim="adamw_torch", logging_steps=100,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step < 200
    report = stop_file(tmp_path)
    assert report["stopped"]
    assert report["stop_step"] == trainer.state.global_step
    assert (tmp_path / f"checkpoint-{report['stop_step']}").is_dir()
    assert f"stopped at step {report['stop_step']}" in capsys.readouterr().err

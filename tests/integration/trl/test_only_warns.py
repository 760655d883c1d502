"""Nothing that only reports ends a run, or keeps a model from being saved."""

import importlib
import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.trainer_utils import HPSearchBackend

from tests.helpers.tiny_dpo import dpo_trainer, pairs

FINAL = "poprisk_noise.json", "flip_report.csv"
TRAINERS = [f"poprisk_integrations.trl.{name}" for name in ("pair_trainer", "poprisk_dpo_trainer")]


def build(output_dir: Path, count: int = 16, **options: Any) -> Any:
    settings = {"stop": False, "max_steps": 4, "noise": "cdpo", "noise_rate": 0.2, "ref_model": 1}
    return dpo_trainer(output_dir, pairs(count), **{**settings, **options})


def warnings(caplog: pytest.LogCaptureFixture, text: str = "") -> list[str]:
    ours = [record for record in caplog.records if record.name.startswith("poprisk")]
    found = [record.message for record in ours if record.levelno >= logging.WARNING]
    return [message for message in found if text in message]


@pytest.mark.parametrize("name", FINAL)
def test_a_report_that_cannot_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    (tmp_path / name).mkdir()  # no file takes the place of a directory
    trainer = build(tmp_path)
    trainer.train()
    (line,) = warnings(caplog)
    assert "flip report and poprisk_noise.json of the run could not be written" in line
    assert "IsADirectoryError" in line
    trainer.save_model(str(tmp_path / "model"))
    trainer.save_model()
    trainer.save_model()
    saved = load_file(tmp_path / "model.safetensors")
    assert torch.equal(saved["lm_head.weight"], trainer.model.lm_head.weight)
    assert (tmp_path / "model" / "flip_report.csv").is_file()
    assert not list(tmp_path.rglob("*.tmp*"))
    if name == "flip_report.csv":
        assert len(warnings(caplog)) == 2  # once, however often the model is saved
        assert f"the model is saved in {str(tmp_path)!r}" in warnings(caplog)[1]


def test_labels_that_do_not_fit_into_a_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    labels = tmp_path / "checkpoint-2" / "poprisk_labels.safetensors"
    labels.mkdir(parents=True)
    trainer = build(tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    assert trainer.state.global_step == 4
    assert [line.partition(" (")[0] for line in warnings(caplog)] == [
        "poprisk_labels.safetensors is not in the checkpoint of step 2"
    ]
    assert (tmp_path / "checkpoint-4" / labels.name).is_file()


# What breaks -> the words of the warning, and options of the run.
BROKEN: dict[str, tuple[str, dict[str, Any]]] = {
    "describe_run": ("flip report and poprisk_noise.json", {}),
    "margin_metrics": ("poprisk/margin_* and poprisk/kl_data are not logged", {}),
    "on_policy_kl": ("the on-policy KL could not be sampled", {"on_policy_kl_samples": 2}),
    "batch_log_ratios": (
        "the margins of a batch are not known",
        {"noise": "auto", "noise_rate": None},
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_an_unexpected_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("CUDA error: out of memory")

    words, options = BROKEN[what]
    (module,) = (name for name in TRAINERS if hasattr(importlib.import_module(name), what))
    monkeypatch.setattr(f"{module}.{what}", broken)
    trainer = build(tmp_path, **options)
    assert trainer.train().global_step == 4
    assert trainer.evaluate(pairs(4))["eval_loss"] > 0
    (line,) = warnings(caplog, "CUDA error: out of memory")
    assert words in line
    assert not any("poprisk/kl_on_policy" in entry for entry in trainer.state.log_history)
    trainer.save_model()
    assert (tmp_path / "model.safetensors").is_file()


def test_rows_of_other_data(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = build(tmp_path)
    trainer.train_dataset = build(tmp_path, count=40).train_dataset
    trainer.train()
    assert trainer.state.global_step == 4
    assert len(warnings(caplog, "the margins of some pairs are lost")) == 1


def test_margins_that_are_not_finite(tmp_path: Path) -> None:
    # huggingface/trl#2435: rewards and logits turn to NaN in the middle of a run.
    trainer = build(tmp_path, learning_rate=1e30)
    trainer.train()
    assert any(math.isnan(line.get("poprisk/margin_p50", 0)) for line in trainer.state.log_history)
    trainer.save_model()
    assert (tmp_path / "model.safetensors").is_file()
    table = trainer.flip_report().to_pandas()
    assert 0 < table["margin"].notna().sum() < 16  # those of the first batches


def test_files_of_a_trial_go_to_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build(tmp_path, save_strategy="steps", save_steps=4, noise="rdpo")
    # What `hyperparameter_search` does for each trial, without the package that draws them.
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    trainer.hp_search_backend, trainer.hp_space = HPSearchBackend.OPTUNA, lambda trial: trial.params
    first_rows = []
    for number in (0, 1):
        trial = SimpleNamespace(number=number, params={"learning_rate": 1e-3 * (1 + 99 * number)})
        trainer.train(trial=trial)
        run = tmp_path / f"run-{number}"
        for name in (*FINAL, "checkpoint-4/poprisk_labels.safetensors"):
            assert (run / name).is_file(), name
        labels = load_file(run / "checkpoint-4" / "poprisk_labels.safetensors")
        first_rows.append(labels["margin"])
    assert not any((tmp_path / name).exists() for name in FINAL)
    # A trial has a model of its own, so margins of an earlier one say nothing about it.
    assert not torch.equal(first_rows[0], first_rows[1])


def test_window_follows_the_batch_size_that_was_found(tmp_path: Path) -> None:
    options = {"auto_find_batch_size": True, "per_device_train_batch_size": 5, "max_steps": 2}
    trainer = build(tmp_path, count=120, stop=True, stop_criterion="signal", **options)

    def small_memory(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if len(kwargs["input_ids"]) > 2 * 4:
            raise RuntimeError("CUDA out of memory.")

    trainer.model.register_forward_pre_hook(small_memory, with_kwargs=True)
    trainer.train()
    assert trainer.state.train_batch_size == 4
    # 30 steps in a pass, a third of them in a window; the configured batch would give 8.
    assert json.loads((tmp_path / "poprisk_stop.json").read_text())["window_steps"] == 10

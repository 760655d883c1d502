"""Trainer.hyperparameter_search: each trial has its own files, where Trainer puts its own."""

import json

import pytest
import transformers
from transformers import Trainer
from transformers.trainer_utils import HPSearchBackend

import poprisk_integrations.huggingface as hf
from tests.helpers.tiny_trainer import TinyModel, arguments, dataset

LEARNING_RATES = (3e-2, 2e-2)


class _Trial:
    def __init__(self, number):
        self.number = number
        self.params = {"learning_rate": LEARNING_RATES[number]}


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """In the middle of a search, as a backend would find it."""
    integrations = transformers.integrations
    monkeypatch.setattr(integrations, "hp_params", lambda trial: trial.params, raising=False)
    args = arguments(
        tmp_path,
        optim="adamw_torch",
        num_train_epochs=16,
        max_grad_norm=0.0,
        save_strategy="best",
        load_best_model_at_end=True,
    )
    trainer = Trainer(
        args=args,
        model_init=lambda: TinyModel(),
        train_dataset=dataset(),
        callbacks=[
            hf.PopRiskEarlyStoppingCallback(criterion="signal", window=8),
            hf.PopRiskLRCut(window=8),
        ],
    )
    trainer.hp_search_backend = HPSearchBackend.OPTUNA
    trainer.hp_space = lambda trial: trial.params
    return trainer


def test_files_lie_beside_the_checkpoints_of_their_trial(tmp_path, trainer):
    trainer.hp_name = lambda trial: f"lr-{trial.number}"
    stops = []
    for number in range(2):
        trainer.train(trial=_Trial(number))
        directory = tmp_path / f"lr-{number}"
        stop = trainer.state.global_step
        stops.append(stop)
        report = json.loads((directory / "poprisk_stop.json").read_text())
        assert (report["stopped"], report["stop_step"]) == (True, stop)
        assert report["history"][0]["lr_sum"] == pytest.approx(8 * LEARNING_RATES[number])
        checkpoint = directory / f"checkpoint-{stop}"
        assert report["best_model_checkpoint"] == str(checkpoint)
        assert trainer.state.best_model_checkpoint == str(checkpoint)
        assert {p.name for p in checkpoint.glob("poprisk_*")} == {
            "poprisk_window.safetensors",
            "poprisk_lr_cut_window.safetensors",
        }
    assert stops[0] != stops[1]
    assert not list(tmp_path.glob("*.json"))
    assert hf.last_whole_checkpoint(directory) == str(checkpoint)

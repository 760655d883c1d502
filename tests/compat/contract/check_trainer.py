"""Hugging Face Trainer: the optimizer's name, a resumed run, the stop, the monitor."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import poprisk_integrations.huggingface as hf
from poprisk_integrations import PopRiskAdamW
from tests.helpers.tiny_trainer import arguments, train, weights


@pytest.mark.parametrize("name", ["poprisk_adamw", "poprisk_adamw_paper", "poprisk_adamw_8bit"])
def test_resumed_run_is_the_whole_run(tmp_path: Path, name: str) -> None:
    # Saved at the end of an epoch: in mid-epoch transformers 4 itself draws other batches.
    options = {"optim": name, "num_train_epochs": 2}
    whole = train(arguments(tmp_path, save_strategy="epoch", **options))
    resumed = train(arguments(tmp_path, **options), resume=str(tmp_path / "checkpoint-8"))
    assert isinstance(whole.optimizer.optimizer, PopRiskAdamW)
    assert resumed.state.global_step == whole.state.global_step == 16
    one, other = weights(whole.model), weights(resumed.model)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_options(tmp_path: Path) -> None:
    text = "gate=hard,false_open_rate=0.1,no_gate=embed|norm"
    groups = train(arguments(tmp_path, optim_args=text, max_steps=1)).optimizer.param_groups
    assert {group["gate"] for group in groups} == {"hard", "none"}


@pytest.mark.parametrize("optim", ["adamw_torch", "poprisk_adamw"])
def test_stop_and_monitor(tmp_path: Path, optim: str) -> None:
    stop = hf.PopRiskEarlyStoppingCallback(window=8)
    monitor = hf.PopRiskMonitorCallback()
    args = arguments(
        tmp_path, optim=optim, num_train_epochs=30, save_strategy="steps", save_steps=8
    )
    trainer = train(args, stop, monitor)
    assert stop.stopping_state["stop_step"] == trainer.state.global_step < 240
    assert (tmp_path / "poprisk_stop.json").is_file()
    logged = [line for line in trainer.state.log_history if "poprisk/signal_ratio" in line]
    assert len(logged) > 2

"""Trainers of TRL that have no subclass here: the gate and the stop by themselves."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import KTOConfig, KTOTrainer

from poprisk_integrations.huggingface import PopRiskEarlyStoppingCallback
from tests.helpers.tiny_dpo import config_options, pairs, tiny_model, tiny_tokenizer, weights_of

GATED = {"optim": "poprisk_adamw", "max_steps": -1, "num_train_epochs": 2}


def single(data: Dataset) -> Dataset:
    """Each completion by itself, with a label."""
    rows = []
    for row in data:
        for kind in ("chosen", "rejected"):
            rows.append(
                {"prompt": row["prompt"], "completion": row[kind], "label": kind == "chosen"}
            )
    return Dataset.from_list(rows)


def kto(folder: Path, **options: Any) -> Any:
    return KTOTrainer(
        tiny_model(), tiny_model(1), KTOConfig(**config_options(folder, **GATED)),
        train_dataset=single(pairs()), processing_class=tiny_tokenizer(), **options,
    )  # fmt: skip


def orpo(folder: Path, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL says that this namespace is experimental
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer
    return ORPOTrainer(
        tiny_model(), ORPOConfig(**config_options(folder, max_length=32, **GATED)),
        train_dataset=pairs(32), processing_class=tiny_tokenizer(), **options,
    )  # fmt: skip


def trained(make: Any, folder: Path) -> tuple[Any, PopRiskEarlyStoppingCallback]:
    stop = PopRiskEarlyStoppingCallback(sit_out=0.5)
    trainer = make(folder, callbacks=[stop])
    start = weights_of(trainer)
    trainer.train()
    assert type(trainer.optimizer.optimizer).__name__ == "PopRiskAdamW"
    assert not torch.equal(weights_of(trainer), start)
    assert trainer.state.global_step == 16
    return trainer, stop


def test_kto(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its loss is none of single examples: the run is watched, and the first line says why."""
    trainer, stop = trained(kto, tmp_path)
    assert stop.criterion_in_use == "signal"
    line = capsys.readouterr().err
    assert "the test loss cannot be estimated (no call of a loss function of torch was seen" in line
    assert "so this run is only watched" in line
    assert trainer.state.log_history[-1]["poprisk/signal_ratio"] == stop.history[-1]["signal_ratio"]
    forced = PopRiskEarlyStoppingCallback(criterion="risk")
    with pytest.raises(ValueError, match="no call of a loss function of torch was seen"):
        kto(tmp_path, callbacks=[forced]).train()


def test_orpo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The term of its loss that is one of torch's is estimated, the chosen completions' NLL; it
    says so."""
    trainer, stop = trained(orpo, tmp_path)
    said = capsys.readouterr().err
    (part,) = re.findall(
        r"only of a part of the loss, .* \((\S+) of (\S+) in a first batch\)", said
    )
    assert stop.criterion_in_use == "risk"
    first = stop.history[0]
    assert first["step"] == 8
    lines = [line for line in trainer.state.log_history if "nll_loss" in line]
    nll = sum(line["nll_loss"] for line in lines[:8]) / 8
    assert first["train_loss"] == pytest.approx(nll, abs=0.05)
    assert first["estimated_test_loss"] == pytest.approx(nll, abs=0.2)
    assert nll < lines[0]["loss"] - 0.01  # the odds ratio is not in it
    assert [float(number) for number in part] == pytest.approx(
        [lines[0]["nll_loss"], lines[0]["loss"]], abs=0.2
    )

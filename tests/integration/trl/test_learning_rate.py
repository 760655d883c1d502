"""A search before DPO: the run after it is the run at its rate, with margins of its own."""

import json

import pytest
import torch
import trl

from poprisk_integrations.huggingface import suggest_learning_rate
from poprisk_integrations.trl import PopRiskDPOConfig
from tests.helpers.tiny_dpo import config_options, dpo_trainer, easy_pairs, losses_of, weights_of

LR = 1e-5


def build(tmp_path, lr, **options):
    options = {"noise": "cdpo", "max_steps": 50, "learning_rate": lr, **options}
    return dpo_trainer(tmp_path, easy_pairs(160), **options)


def test_auto_learning_rate(tmp_path, capsys):
    saves = {"save_strategy": "steps", "save_steps": 30}
    searched = build(tmp_path / "auto", LR, auto_learning_rate=True, **saves)
    searched.train()
    found = json.loads((tmp_path / "auto/poprisk_learning_rate.json").read_text())
    assert f"poprisk: learning rate {found['suggested']:.1e}" in capsys.readouterr().err
    assert searched.args.learning_rate == found["suggested"] > 10 * LR
    assert min(candidate["rate"] for candidate in found["candidates"]) == LR
    assert found["total_steps"] == 50

    plain = build(tmp_path / "plain", found["suggested"])
    plain.train()
    assert losses_of(searched) == losses_of(plain)
    assert torch.equal(weights_of(searched), weights_of(plain))
    assert searched.flip_report().to_pandas().equals(plain.flip_report().to_pandas())

    (tmp_path / "auto/poprisk_learning_rate.json").unlink()
    resumed = build(tmp_path / "auto", LR, auto_learning_rate=True, **saves)
    resumed.train(resume_from_checkpoint=str(tmp_path / "auto/checkpoint-30"))
    assert torch.equal(weights_of(resumed), weights_of(searched))
    assert not (tmp_path / "auto/poprisk_learning_rate.json").exists()


def test_trl_trainer_as_it_is(tmp_path):
    trainer = dpo_trainer(
        tmp_path,
        easy_pairs(160),
        kind=trl.DPOTrainer,
        config=trl.DPOConfig,
        learning_rate=LR,
        max_steps=50,
    )
    before = weights_of(trainer)
    found = suggest_learning_rate(trainer, 20, 8)
    assert found.suggested > 10 * LR
    assert trainer.args.learning_rate == LR
    assert torch.equal(weights_of(trainer), before)


def test_refused_where_weights_are_sharded(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"Invalid auto_learning_rate: True\. Under FSDP"):
        PopRiskDPOConfig(**config_options(tmp_path), auto_learning_rate=True)

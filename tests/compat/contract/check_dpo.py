"""TRL: one offline DPO run on wrong labels, whole and with LoRA, and TRL's own run bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.trl import PopRiskDPOConfig, PopRiskDPOTrainer
from tests.helpers.tiny_dpo import config_options, pairs, tiny_model, tiny_tokenizer


def _run(trainer: type[DPOTrainer], args: DPOConfig, lora: bool = False) -> Any:
    run = trainer(
        tiny_model(),
        ref_model=None if lora else tiny_model(),
        args=args,
        train_dataset=pairs(64),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if lora else None,
    )
    run.train()
    return run


@pytest.mark.parametrize("lora", [False, True])
def test_defaults(tmp_path: Path, lora: bool) -> None:
    args = PopRiskDPOConfig(**config_options(tmp_path, max_steps=24))
    run = _run(PopRiskDPOTrainer, args, lora)
    assert isinstance(run.optimizer.optimizer, PopRiskAdamW)
    lines = [line for line in run.state.log_history if "loss" in line]
    for key in ("poprisk/margin_p50", "poprisk/kl_data", "rewards/accuracies"):
        assert all(key in line for line in lines), key
    assert any("poprisk/signal_ratio" in line for line in lines)
    assert any("poprisk/noise_rate" in line for line in run.state.log_history)
    assert len(run.flip_report().top(5)) == 5


@pytest.mark.parametrize("lora", [False, True])
def test_off_is_trl_bit_for_bit(tmp_path: Path, lora: bool) -> None:
    options = config_options(tmp_path, optim="adamw_torch")
    theirs = _run(DPOTrainer, DPOConfig(**options), lora)
    ours = _run(PopRiskDPOTrainer, PopRiskDPOConfig(**options, noise="off", stop=False), lora)
    one, other = theirs.model.state_dict(), ours.model.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("noise", ["cdpo", "rdpo", "holder"])
def test_losses(tmp_path: Path, noise: str) -> None:
    rate = None if noise == "holder" else 0.2
    options = config_options(tmp_path, max_steps=2, learning_rate=1e-4)
    run = _run(PopRiskDPOTrainer, PopRiskDPOConfig(**options, noise=noise, noise_rate=rate))
    assert run.state.global_step == 2

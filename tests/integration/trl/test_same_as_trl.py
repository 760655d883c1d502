"""With noise off and AdamW, training is TRL's, bit for bit: also while the stop looks on."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from packaging.version import Version
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from poprisk_integrations.trl import PopRiskDPOConfig, PopRiskDPOTrainer
from tests.helpers.tiny_dpo import dpo_trainer, needs_trl, pairs, tiny_model, upstream_numbers

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
# Before, TRL loads the reference by the name of the model even for this.
PRECOMPUTES_IN_MEMORY = Version(trl.__version__) >= Version("1.9")
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"peft": True},
    "precomputed": {"ref": not PRECOMPUTES_IN_MEMORY, "precompute_ref_log_probs": True},
    "accumulation": {"gradient_accumulation_steps": 2},
    "lora, precomputed, accumulation": {
        "peft": True,
        "precompute_ref_log_probs": True,
        "gradient_accumulation_steps": 2,
    },
    "bf16 autocast, checkpointing": {"bf16": True, "gradient_checkpointing": True},
    "several losses": {"loss_type": ["sigmoid", "robust", "sft"], "label_smoothing": 0.1},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 2},
}
# What ours has besides. In one epoch nobody sits out.
OURS: dict[str, dict[str, Any]] = {
    "no stop": {"stop": False},
    "signal": {"stop_criterion": "signal", "stop_action": "monitor", "stop_window": 4},
    "risk": {"stop_criterion": "risk"},
}
ONE_EPOCH = {"train": pairs(32), "max_steps": -1, "num_train_epochs": 1}
RUNS = [
    *(("full", ours) for ours in OURS),
    *((case, "risk") for case in CASES if case != "full"),
    *(pytest.param(case, "signal", marks=pytest.mark.slow) for case in CASES if case != "full"),
]


def build(folder: Path, *, peft: bool = False, ref: bool = True, **options: Any) -> Any:
    """A trainer of a case; `kind` and `config` may be TRL's."""
    options.setdefault("ref_model", 0 if ref and not peft else None)
    lora = LoraConfig(**LORA) if peft else None
    defaults: dict[str, Any] = {"train": pairs(16), "optim": "adamw_torch"}
    return dpo_trainer(
        folder, evaluation=pairs(8, seed=1), peft_config=lora, **{**defaults, **options}
    )


@functools.cache
def of_trl(case: str) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Log and weights of TRL's own run of a case."""
    with tempfile.TemporaryDirectory() as folder:
        options = {**CASES[case], **ONE_EPOCH}
        trainer = build(Path(folder), kind=DPOTrainer, config=DPOConfig, **options)
        trainer.train()
    return upstream_numbers(trainer), trainer.model.state_dict()


@pytest.mark.parametrize(("case", "ours"), RUNS)
def test_same_log_and_weights(tmp_path: Path, case: str, ours: str) -> None:
    mine = build(tmp_path, noise="off", **CASES[case], **ONE_EPOCH, **OURS[ours])
    mine.train()
    numbers, expected = of_trl(case)
    assert upstream_numbers(mine) == numbers
    weights = mine.model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    start = tiny_model().state_dict()
    assert any(not torch.equal(weights[n], start[n]) for n in weights if n in start) or "lora" in case  # noqa: E501  # fmt: skip
    # Our own numbers are there, too: the comparison covers the recording of the margins.
    lines = [line for line in mine.state.log_history if "loss" in line]
    assert all("poprisk/margin_p50" in line for line in lines)
    assert any("poprisk/signal_ratio" in line for line in lines) == (ours == "signal")
    if ours == "risk":
        last = mine.state.log_history[-1]
        assert 0.0 <= last["poprisk/estimated_test_reward_accuracy"] <= 1.0


@needs_trl("1.15", "warning for return_outputs")
def test_return_outputs_is_that_of_trl(tmp_path: Path) -> None:
    found = []
    for kind, config in ((DPOTrainer, DPOConfig), (PopRiskDPOTrainer, PopRiskDPOConfig)):
        trainer = build(tmp_path, kind=kind, config=config, ref_model=1)
        inputs = next(iter(trainer.get_train_dataloader()))
        with pytest.warns(FutureWarning, match="return_outputs"):
            found.append(trainer.compute_loss(trainer.model, inputs, return_outputs=True))
    (expected_loss, expected_outputs), (loss, outputs) = found
    assert torch.equal(loss, expected_loss)
    assert torch.equal(outputs.logits, expected_outputs.logits)

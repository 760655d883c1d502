"""With noise off and AdamW, training is TRL's, bit for bit: also while the stop looks on."""

from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from packaging.version import Version
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from poprisk_integrations.trl import PopRiskDPOConfig, PopRiskDPOTrainer
from tests.helpers.tiny_dpo import config_options, pairs, tiny_model, tiny_tokenizer
from tests.helpers.trl_versions import needs_trl

# transformers 5.23 deprecates a name that TRL 1.16 still uses.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

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
QUIET = {"stop": False, "noise": "off"}
MONITOR = {"stop": True, "noise": "off", "stop_action": "monitor", "stop_window": 4}
PLAIN = ["full", "lora", "precomputed", "accumulation"]
RUNS = [(case, MONITOR) for case in CASES] + [(case, QUIET) for case in PLAIN]


def train(
    trainer_class: type[DPOTrainer],
    config_class: type[DPOConfig],
    output_dir: Path,
    *,
    peft: bool = False,
    ref: bool = True,
    **options: Any,
) -> DPOTrainer:
    trainer = trainer_class(
        tiny_model(),
        ref_model=tiny_model() if ref and not peft else None,
        args=config_class(**config_options(output_dir, optim="adamw_torch", **options)),
        train_dataset=pairs(),
        eval_dataset=pairs(8, seed=1),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(**LORA) if peft else None,
    )
    trainer.train()
    return trainer


def upstream_numbers(trainer: DPOTrainer) -> list[dict[str, float]]:
    """The log without our own keys and without timings."""
    return [
        {
            name: value
            for name, value in line.items()
            if "poprisk/" not in name and "runtime" not in name and "per_second" not in name
        }
        for line in trainer.state.log_history
    ]


@pytest.mark.parametrize(("case", "ours"), RUNS)
def test_same_log_and_weights(tmp_path: Path, case: str, ours: dict[str, Any]) -> None:
    options = CASES[case]
    theirs = train(DPOTrainer, DPOConfig, tmp_path / "theirs", **options)
    mine = train(PopRiskDPOTrainer, PopRiskDPOConfig, tmp_path / "ours", **options, **ours)
    assert upstream_numbers(mine) == upstream_numbers(theirs)
    weights, expected = mine.model.state_dict(), theirs.model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    start = tiny_model().state_dict()
    assert any(
        not torch.equal(tensor, start.get(name, torch.zeros_like(tensor)))
        for name, tensor in weights.items()
    )
    # Our own numbers are there, too: the comparison covers the recording of the margins.
    lines = [line for line in mine.state.log_history if "loss" in line]
    assert all("poprisk/margin_p50" in line for line in lines)
    assert any("poprisk/signal_ratio" in line for line in lines) == ours["stop"]


@needs_trl("1.15", "warning for return_outputs")
def test_return_outputs_is_that_of_trl(tmp_path: Path) -> None:
    trainers = [
        trainer_class(
            tiny_model(),
            ref_model=tiny_model(1),
            args=config_class(**config_options(tmp_path)),
            train_dataset=pairs(),
            processing_class=tiny_tokenizer(),
        )
        for trainer_class, config_class in (
            (DPOTrainer, DPOConfig),
            (PopRiskDPOTrainer, PopRiskDPOConfig),
        )
    ]
    found = []
    for trainer in trainers:
        inputs = next(iter(trainer.get_train_dataloader()))
        with pytest.warns(FutureWarning, match="return_outputs"):
            found.append(trainer.compute_loss(trainer.model, inputs, return_outputs=True))
    (loss, outputs), (expected_loss, expected_outputs) = found
    assert torch.equal(loss, expected_loss)
    assert torch.equal(outputs.logits, expected_outputs.logits)

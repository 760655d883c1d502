"""A preference data set, a tokenizer and a random Llama: a DPO run of seconds, with no download."""

import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from packaging.version import Version
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

__all__ = [
    "Interrupt",
    "config_options",
    "dpo_trainer",
    "easy_pairs",
    "losses_of",
    "needs_trl",
    "pairs",
    "save_model",
    "sequence_log_probs",
    "tiny_model",
    "tiny_tokenizer",
    "upstream_numbers",
    "weights_of",
]

# deepspeed, where installed, sets it on import, and accelerate imports it late: in the midst of a
# test, which would then look as if it leaked into the environment.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

_WORDS = ("ash", "bay", "cat", "dew", "elm", "fog", "gum", "hay", "ice", "jay", "kin", "lot")


def pairs(count: int = 16, seed: int = 0) -> Dataset:
    """Pairs of word strings; the chosen one repeats the prompt's last word."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        prompt = rng.choices(_WORDS, k=4)
        other = rng.choice([word for word in _WORDS if word != prompt[-1]])
        tail = rng.choices(_WORDS, k=rng.randint(1, 4))
        rows.append(
            {
                "prompt": " ".join(prompt),
                "chosen": " " + " ".join([prompt[-1], *tail]),
                "rejected": " " + " ".join([other, *tail[:2]]),
            }
        )
    return Dataset.from_list(rows)


def easy_pairs(count: int, seed: int = 0) -> Dataset:
    """Pairs of which a few steps learn the rule: most words of the chosen are of the first half."""
    rng = random.Random(seed)
    half = len(_WORDS) // 2
    rows = []
    for _ in range(count):
        good, bad = (
            [rng.choice(part if rng.random() < 0.9 else _WORDS) for _ in range(5)]
            for part in (_WORDS[:half], _WORDS[half:])
        )
        prompt = " ".join(rng.choices(_WORDS, k=3))
        rows.append(
            {"prompt": prompt, "chosen": f" {' '.join(good)}", "rejected": f" {' '.join(bad)}"}
        )
    return Dataset.from_list(rows)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer trained on the words above."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<unk>", "<pad>", "<eos>"]
    tokenizer.train_from_iterator(_WORDS, trainers.WordLevelTrainer(special_tokens=special))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>"
    )


def tiny_model(seed: int = 0) -> LlamaForCausalLM:
    """A random Llama of about 20k parameters; the same seed gives the same weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(_WORDS) + 3,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,  # larger than usual: a few steps must move the outputs
        pad_token_id=1,
        eos_token_id=2,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def save_model(path: Path, seed: int = 0) -> str:
    """Write model and tokenizer to a directory, as a local checkpoint."""
    tiny_model(seed).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


def config_options(output_dir: Path, **changes: Any) -> dict[str, Any]:
    """Options of a short fp32 run on the CPU that logs every step and saves nothing."""
    options: dict[str, Any] = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 7,
    }
    return {**options, **changes}


def dpo_trainer(
    output_dir: Path,
    train: Any = None,
    evaluation: Any = None,
    *,
    kind: Any = None,
    config: Any = None,
    model: Any = None,
    ref_model: Any = 0,
    callbacks: list[Any] | None = None,
    peft_config: Any = None,
    data_collator: Any = None,
    **options: Any,
) -> Any:
    """A trainer on the tiny model, ours unless another `kind` and `config` are given.

    `ref_model` is a seed, a model, or None.
    """
    from poprisk_integrations.trl import PopRiskDPOConfig, PopRiskDPOTrainer

    return (kind or PopRiskDPOTrainer)(
        tiny_model() if model is None else model,
        tiny_model(ref_model) if isinstance(ref_model, int) else ref_model,
        (config or PopRiskDPOConfig)(**config_options(output_dir, **options)),
        data_collator=data_collator,
        train_dataset=pairs() if train is None else train,
        eval_dataset=evaluation,
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
        peft_config=peft_config,
    )


def needs_trl(version: str, what: str) -> Any:
    """Skip below a version, with the reason."""
    old = Version(trl.__version__) < Version(version)
    return pytest.mark.skipif(old, reason=f"TRL {trl.__version__} has no {what}")


def losses_of(trainer: Any) -> list[float]:
    """The logged training losses."""
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def weights_of(trainer: Any) -> torch.Tensor:
    """All parameters of the policy, as one vector."""
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def upstream_numbers(trainer: Any) -> list[dict[str, float]]:
    """The log without our own keys and without timings."""
    ours = ("poprisk/", "runtime", "per_second")
    return [
        {name: value for name, value in line.items() if not any(part in name for part in ours)}
        for line in trainer.state.log_history
    ]


def sequence_log_probs(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """Of the completions of a batch, in float64 straight from the logits."""
    logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    log_probs = logits.double().log_softmax(-1)[:, :-1]
    tokens = log_probs.gather(-1, inputs["input_ids"][:, 1:, None]).squeeze(-1)
    return (tokens * inputs["completion_mask"][:, 1:]).sum(1)


class Interrupt(TrainerCallback):
    """Stands for a killed process: the run ends right after a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save, and stop."""
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True

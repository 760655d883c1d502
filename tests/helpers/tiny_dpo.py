"""A preference data set, a tokenizer and a random Llama: a DPO run of seconds, with no download."""

import os
import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["config_options", "easy_pairs", "pairs", "save_model", "tiny_model", "tiny_tokenizer"]

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

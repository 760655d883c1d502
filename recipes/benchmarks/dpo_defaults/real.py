"""The synthetic task of `cleaned_pairs` for the real trainers: tokens, a transformers model, a run.

The policy is a GPT-2 that computes what the stacked decoder there computes: its biases and norms,
which that one does not have, are frozen at 0 and 1.
"""

import tempfile
from functools import cache
from typing import Any
from unittest.mock import patch

import accelerate.utils.imports as installed
import torch
from benchmarks.cleaned_pairs.language import EOS, LONGEST, PAD, PROMPT, VOCABULARY
from benchmarks.cleaned_pairs.model import HEADS, HIDDEN, LAYERS, LENGTH, WIDTH, Params
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer

from poprisk_integrations.trl import PopRiskDPOConfig, PopRiskDPOTrainer

__all__ = ["ARMS", "pairs_of", "policy", "stacked", "trained"]

ARMS: dict[str, dict[str, Any]] = {  # what differs from the defaults of the arm's config
    "plain": {},
    "defaults": {},
    "gate alone": {"stop": False},
    "stop alone": {"optim": DPOConfig.__dataclass_fields__["optim"].default},
    "open gate": {"optim_args": "false_open_rate=0.3173"},
    "full steps": {"optim_args": "preserve_norm=True"},
    "half gate": {"optim_args": "gate_blend=0.5"},
    "late gate": {"optim_args": "gate_warmup=100"},
    "temporal": {"optim_args": "noise_source=temporal"},
    "few sit": {"stop_sit_out": 0.05},
    "few sit, late gate": {"stop_sit_out": 0.05, "optim_args": "gate_warmup=100"},
    "few sit, half gate": {"stop_sit_out": 0.05, "optim_args": "gate_blend=0.5"},
    "few sit, full steps": {"stop_sit_out": 0.05, "optim_args": "preserve_norm=True"},
}


def policy(params: Params) -> GPT2LMHeadModel:
    """The model of a member; `params` have one."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=PROMPT + LONGEST, n_embd=WIDTH, n_layer=LAYERS,
        n_head=HEADS, n_inner=HIDDEN, activation_function="relu", resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, tie_word_embeddings=False, bos_token_id=None, eos_token_id=EOS,
        pad_token_id=PAD,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in own.items():
            if name.endswith("bias"):
                p.zero_()
            if name.endswith("bias") or ".ln_" in name:
                p.requires_grad_(False)
        own["transformer.wpe.weight"].zero_()  # that of the last token predicts nothing
        for name, view in _views(own).items():
            view.copy_(params[name][0])
    return model


def stacked(model: torch.nn.Module) -> Params:
    """The reverse, with a member axis of one."""
    views = _views(dict(model.named_parameters()))
    return {name: view.detach().clone()[None] for name, view in views.items()}


def _views(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The decoder's parameters, where they lie in the model's."""
    found = {
        "embed": own["transformer.wte.weight"],
        "place": own["transformer.wpe.weight"][:LENGTH],
        "head": own["lm_head.weight"].T,
    }
    for i in range(LAYERS):
        block = f"transformer.h.{i}"
        found[f"{i}.qkv"] = own[f"{block}.attn.c_attn.weight"]
        found[f"{i}.out"] = own[f"{block}.attn.c_proj.weight"]
        found[f"{i}.up"] = own[f"{block}.mlp.c_fc.weight"]
        found[f"{i}.down"] = own[f"{block}.mlp.c_proj.weight"]
    return found


def pairs_of(prompts: Tensor, chosen: Tensor, rejected: Tensor) -> Dataset:
    """Rows as TRL has them once they are tokenized."""
    columns = {"prompt_ids": prompts, "chosen_ids": chosen, "rejected_ids": rejected}
    return Dataset.from_dict(
        {name: [[t for t in row if t != PAD] for row in x.tolist()] for name, x in columns.items()}
    )


class _Tokenized:
    """Trains on tokens as they are."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        return dataset


class _Plain(_Tokenized, DPOTrainer):
    pass


class _Ours(_Tokenized, PopRiskDPOTrainer):
    pass


def trained(
    arm: str,
    reference: Params,
    data: Dataset,
    *,
    seed: int,
    lr: float,
    schedule: str,
    epochs: int,
    callback: TrainerCallback,
) -> Any:
    """A trainer that has trained. Rate, schedule, epochs, batch and seed apart, by its defaults."""
    trainer_class, config_class = (_Ours, PopRiskDPOConfig)
    if arm == "plain":
        trainer_class, config_class = (_Plain, DPOConfig)
    # It is asked in each step whether peft is there, which reads that package's metadata anew.
    asked = cache(installed._is_package_available)
    asks_once = patch.object(installed, "_is_package_available", asked)
    with asks_once, tempfile.TemporaryDirectory() as folder:
        config = config_class(
            output_dir=folder, learning_rate=lr, lr_scheduler_type=schedule,
            num_train_epochs=epochs, per_device_train_batch_size=32, seed=seed,
            # What does not change what is learned:
            use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no",
            logging_strategy="epoch", report_to="none", disable_tqdm=True, **ARMS[arm],
        )  # fmt: skip
        trainer = trainer_class(
            policy(reference), policy(reference), config, train_dataset=data,
            processing_class=_tokenizer(), callbacks=[callback],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer


def _tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": PAD, "<eos>": EOS}
    words |= {f"w{i}": i for i in range(VOCABULARY) if i not in (PAD, EOS)}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")

"""A reward model on the pairs of `tiny_dpo`: a random Llama with one output."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from tests.helpers.tiny_dpo import config_options, pairs, tiny_model, tiny_tokenizer

__all__ = ["reward_trainer", "rewards", "tiny_reward_model"]


def tiny_reward_model(seed: int = 0, **changes: Any) -> LlamaForSequenceClassification:
    """The Llama of `tiny_model` with a head of one output; the same seed gives the same weights."""
    options = {"num_labels": 1, "id2label": {0: "reward"}, "label2id": {"reward": 0}, **changes}
    config = LlamaConfig(**{**tiny_model().config.to_dict(), **options})
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(config)


def reward_trainer(
    output_dir: Path,
    train: Any = None,
    evaluation: Any = None,
    *,
    kind: Any = None,
    config: Any = None,
    model: Any = None,
    callbacks: list[Any] | None = None,
    peft_config: Any = None,
    data_collator: Any = None,
    **options: Any,
) -> Any:
    """A trainer on the tiny model, ours unless another `kind` and `config` are given."""
    from poprisk_integrations.trl import PopRiskRewardConfig, PopRiskRewardTrainer

    return (kind or PopRiskRewardTrainer)(
        tiny_reward_model() if model is None else model,
        (config or PopRiskRewardConfig)(**config_options(output_dir, **options)),
        data_collator=data_collator,
        train_dataset=pairs() if train is None else train,
        eval_dataset=evaluation,
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
        peft_config=peft_config,
    )


def rewards(trainer: Any, data: Any) -> torch.Tensor:
    """Of all completions of prepared data, one at a time: (N, 2), chosen and rejected."""
    found = []
    for row in data.with_format(None):
        with torch.no_grad():
            pair = [torch.tensor([row[f"{part}_ids"]]) for part in ("chosen", "rejected")]
            found.append([float(trainer.model.eval()(ids).logits) for ids in pair])
    return torch.tensor(found)

"""Texts that sit out of trl.SFTTrainer's epochs, in all the ways in which it batches them."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.nn.functional import cross_entropy
from trl import SFTConfig, SFTTrainer

from poprisk_integrations.huggingface import PopRiskEarlyStoppingCallback
from tests.helpers.tiny_dpo import config_options, needs_trl, tiny_model, tiny_tokenizer

WORDS = ("ash", "bay", "cat", "dew", "elm", "fog", "gum", "hay", "ice", "jay", "kin", "lot")
CHAT = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }} <eos>"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %} {% endfor %}"
)


def sentences(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(5, 12))) for _ in range(count)]


def data_of(kind: str, count: int = 64) -> Dataset:
    first, second = sentences(count, 0), sentences(count, 1)
    if kind == "text":
        return Dataset.from_dict({"text": first})
    if kind == "completion":
        return Dataset.from_dict({"prompt": first, "completion": [f" {text}" for text in second]})
    turns = [
        [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        for asked, said in zip(first, second, strict=True)
    ]
    return Dataset.from_dict({"messages": turns})


def trained(
    output_dir: Path, kind: str = "text", *, peft: bool = False, data: Any = None, **options: Any
) -> tuple[SFTTrainer, PopRiskEarlyStoppingCallback]:
    criterion = options.pop("criterion", "risk")
    # Half of this share sits out, in a short run.
    stop = PopRiskEarlyStoppingCallback(criterion=criterion, sit_out=0.5)
    defaults: dict[str, Any] = {"max_steps": -1, "num_train_epochs": 2, "max_length": 64}
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    trainer = SFTTrainer(
        tiny_model(),
        args=SFTConfig(**config_options(output_dir, **{**defaults, **options})),
        train_dataset=data_of(kind) if data is None else data,
        processing_class=tokenizer,
        callbacks=[stop],
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if peft else None,
    )
    trainer.train()
    return trainer, stop


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "text": ("text", {}),
    "completion only": ("completion", {}),
    "assistant only": ("chat", {"assistant_only_loss": True}),
    "packed": ("text", {"packing": True, "packing_strategy": "wrapped", "max_length": 12}),
    "lora": ("text", {"peft": True}),
    "accumulation": ("text", {"gradient_accumulation_steps": 3}),
    "bf16 autocast, checkpointing": ("text", {"bf16": True, "gradient_checkpointing": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_standing_model_loses_what_all_texts_lose(tmp_path: Path, case: str) -> None:
    kind, options = CASES[case]
    trainer, stop = trained(tmp_path, kind, learning_rate=0.0, **options)
    assert stop.criterion_in_use == "risk"
    losses, hits = [], []
    for example in trainer.get_train_dataloader().dataset:
        batch = trainer.data_collator([dict(example)])
        with torch.no_grad():
            logits = trainer.model.eval()(batch["input_ids"]).logits[0, :-1]
        labels = batch["labels"][0, 1:]
        if (labels != -100).any():
            losses.append(float(cross_entropy(logits, labels)))
            hits.append(float((logits.argmax(-1) == labels)[labels != -100].float().mean()))
    tolerance = 3e-3 if options.get("bf16") else 1e-5
    first = stop.history[0]
    assert first["estimated_test_loss"] == pytest.approx(sum(losses) / len(losses), abs=tolerance)
    assert first["estimated_test_accuracy"] == pytest.approx(
        sum(hits) / len(hits), abs=10 * tolerance
    )
    second = stop.history[1]  # of 16 texts, corrected by what the same ones lost before
    change = second["estimated_test_loss"] - first["estimated_test_loss"]
    assert abs(change) < 3 * second["estimated_test_loss_se"] < 0.1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"packing": True, "max_length": 24}, "do not show whose a token is"),
        ({"padding_free": True, "max_length": None}, "do not show whose a token is"),
        pytest.param(
            {"loss_type": "dft"}, "loss_type='dft'", marks=needs_trl("1.15", "fused head")
        ),
        ({"max_steps": 4, "data": data_of("text").to_iterable_dataset()}, "a stream"),
    ],
    ids=["packed without padding", "padding-free", "dft", "stream"],
)
def test_where_it_is_refused(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        trained(tmp_path, **options)
    options = {**options, "max_steps": 2}
    trainer, stop = trained(tmp_path, criterion="auto", **options)
    assert stop.criterion_in_use != "risk"
    assert trainer.state.global_step == 2


@needs_trl("1.15", "fused head")
def test_trls_numbers_are_those_of_the_texts_that_are_trained_on(tmp_path: Path) -> None:
    trainer, stop = trained(tmp_path)
    tokens = [line["num_tokens"] for line in trainer.state.log_history if "num_tokens" in line]
    total = sum(len(ids) for ids in trainer.train_dataset["input_ids"])
    assert 1.6 * total < tokens[-1] < 1.9 * total  # 16 of 64 do not count in the first epoch
    last = trainer.state.log_history[-1]
    row = stop.history[-1]
    assert last["poprisk/estimated_test_loss"] == row["estimated_test_loss"]
    assert last["poprisk/estimated_test_accuracy_se"] == row["estimated_test_accuracy_se"]
    assert not trainer.model._forward_hooks
    assert "compute_loss" not in vars(trainer)

"""A small Llama, its supervised fine-tuning, and samples from it."""

# transformers leaves some of its functions untyped, and `generate` is typed for a protocol.
# mypy: disable-error-code="no-untyped-call,misc"

from collections.abc import Callable, Sequence

import torch
from datasets import Dataset
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from poprisk_integrations.cli.demo.corpus import TextWindow, starts_word
from poprisk_integrations.cli.demo.progress import StepProgress
from poprisk_integrations.cli.demo.settings import QUIET_RUN, DemoSettings

__all__ = ["build_model", "fine_tune", "sample_continuations"]

_SAMPLE_BATCH = 200


def build_model(
    settings: DemoSettings, tokenizer: PreTrainedTokenizerFast, seed: int
) -> LlamaForCausalLM:
    """A Llama with random weights, input and output embeddings tied."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.hidden_size,
            intermediate_size=settings.intermediate_size,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.heads,
            max_position_embeddings=4 * (settings.prompt_tokens + settings.continuation_tokens),
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


def fine_tune(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    windows: Sequence[TextWindow],
    settings: DemoSettings,
    *,
    seed: int,
    scratch: str,
    on_step: Callable[[int], None],
) -> float:
    """Next-token training on whole windows, each closed by the end-of-sequence token.

    The model is trained in place; the mean training loss in nats per token is returned.
    """
    rows = [
        {"input_ids": [*window.prompt, *window.continuation, tokenizer.eos_token_id]}
        for window in windows
    ]
    arguments = TrainingArguments(
        output_dir=scratch,
        max_steps=settings.sft_steps,
        per_device_train_batch_size=settings.sft_batch_size,
        learning_rate=settings.sft_learning_rate,
        warmup_steps=settings.sft_steps // 10,
        lr_scheduler_type="constant_with_warmup",
        weight_decay=0.1,
        optim="adamw_torch",
        seed=seed,
        **QUIET_RUN,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[StepProgress(on_step)],
    )
    loss = trainer.train().training_loss
    model.eval()
    return float(loss)


@torch.no_grad()
def sample_continuations(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    seed: int,
    on_batch: Callable[[int], None],
) -> list[list[int]]:
    """One sample per prompt at temperature 1, cut by the rule that cuts the human text.

    It starts at a word and ends after the last whole word within `max_tokens` tokens, so neither
    length nor a broken word tells a sample from the human continuation.
    """
    word_start = starts_word(tokenizer)
    not_first = [index for index, is_start in enumerate(word_start) if not is_start]
    torch.manual_seed(seed)
    samples: list[list[int]] = []
    for first in range(0, len(prompts), _SAMPLE_BATCH):
        batch = tokenizer.pad(
            {"input_ids": [list(prompt) for prompt in prompts[first : first + _SAMPLE_BATCH]]},
            return_tensors="pt",
        )
        drawn = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_tokens + 1,  # the last one only shows where a word ends
            suppress_tokens=[tokenizer.pad_token_id, tokenizer.eos_token_id],
            begin_suppress_tokens=not_first,
        )
        for row in drawn[:, batch["input_ids"].shape[1] :].tolist():
            ends = [i for i in range(1, len(row)) if word_start[row[i]]]
            samples.append(row[: ends[-1]] if ends else row[:max_tokens])
        on_batch(len(samples))
    return samples

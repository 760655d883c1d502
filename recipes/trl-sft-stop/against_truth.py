"""The estimated test loss of a fine-tuning of three epochs beside the true one.

Usage: python recipes/trl-sft-stop/against_truth.py [--out PNG] [--seed N]

The true one is measured on 1,000 lists of words with as many wrong words, which the run never sees.
"""

import argparse
import tempfile
from itertools import pairwise
from pathlib import Path

import matplotlib
import torch
from train import word_lists
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from poprisk_integrations.cli.builtin import local_model
from poprisk_integrations.huggingface import PopRiskEarlyStoppingCallback

LISTS, OTHERS, EPOCHS, WRONG = 1500, 1000, 3, 0.3
TRUE, ESTIMATED, TRAINING = "#222222", "#D55E00", "#0072B2"


class Truth(TrainerCallback):
    """Loss and accuracy of next words on lists never trained on, so many steps apart."""

    def __init__(self, tokens: torch.Tensor, every: int) -> None:
        self.tokens, self.every = tokens, every
        self.rows: list[dict] = []

    def on_step_begin(self, args, state, control, model=None, **kwargs) -> None:
        if state.global_step % self.every:
            return
        with torch.no_grad():
            logits = torch.cat([model(part).logits[:, :-1] for part in self.tokens.split(250)])
        targets = self.tokens[:, 1:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        accuracy = (logits.argmax(-1) == targets).double().mean()
        row = {"loss": float(loss), "accuracy": float(accuracy)}
        self.rows.append({"step": state.global_step, **row})


def run(seed: int) -> tuple[list[dict], list[dict]]:
    """Windows of the run, and the truth."""
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = AutoTokenizer.from_pretrained(
            local_model("builtin:tiny-llama", Path(directory))
        )
        set_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=128,
                intermediate_size=256,
                num_hidden_layers=3,
                num_attention_heads=4,
                max_position_embeddings=64,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        test = word_lists(OTHERS, WRONG, seed=1000 + seed)["text"]
        tokens = tokenizer([text + tokenizer.eos_token for text in test], return_tensors="pt")
        args = SFTConfig(
            directory,
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            warmup_steps=30,
            max_length=64,
            save_strategy="no",
            logging_steps=50,
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            seed=seed,
        )
        steps = -(-LISTS // 8)
        stop, truth = PopRiskEarlyStoppingCallback(), Truth(tokens["input_ids"], steps // 16)
        SFTTrainer(
            model,
            args=args,
            train_dataset=word_lists(LISTS, WRONG, seed=seed),
            processing_class=tokenizer,
            callbacks=[stop, truth],
        ).train()
    return stop.history, truth.rows


def true_means(windows: list[dict], truth: list[dict], name: str) -> list[float]:
    """The truth, averaged over each window as the estimate is."""
    ends = [0, *(row["step"] for row in windows)]
    parts = [
        [row[name] for row in truth if start <= row["step"] < end] for start, end in pairwise(ends)
    ]
    return [sum(part) / len(part) for part in parts]


def draw(windows: list[dict], truth: list[dict], path: Path) -> None:
    """Loss and accuracy over the epochs: estimated with its 90 % band, true, training."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    per_epoch = windows[-1]["step"] / windows[-1]["epoch"]
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")
    for axis, name in zip(axes, ("loss", "accuracy"), strict=True):
        ends = [row["epoch"] for row in windows]
        middles = [(a + b) / 2 for a, b in zip([0.0, *ends[:-1]], ends, strict=True)]
        value = [row[f"estimated_test_{name}"] for row in windows]
        error = [1.645 * row[f"estimated_test_{name}_se"] for row in windows]
        low, high = ([v + s * e for v, e in zip(value, error, strict=True)] for s in (-1, 1))
        steps = [row["step"] / per_epoch for row in truth]
        true = [row[name] for row in truth]
        axis.plot(steps, true, color=TRUE, lw=2, label="true, on lists never seen")
        axis.fill_between(middles, low, high, color=ESTIMATED, alpha=0.18, lw=0)
        axis.plot(middles, value, color=ESTIMATED, marker="o", ms=4, label="estimated (90 %)")
        train = [row[f"train_{name}"] for row in windows]
        axis.plot(middles, train, color=TRAINING, ls="--", label="training")
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("loss, nats per token")
    axes[1].set_ylabel("next words that are right")
    axes[0].legend(fontsize=8, framealpha=0.9, edgecolor="none")
    figure.savefig(path, dpi=130)


def main() -> None:
    """Train, print the mean error, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("against_truth.png"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    windows, truth = run(args.seed)
    for name in ("loss", "accuracy"):
        errors = [
            (abs(row[f"estimated_test_{name}"] - true), row[f"estimated_test_{name}_se"])
            for row, true in zip(windows, true_means(windows, truth, name), strict=True)
        ]
        mean = sum(error for error, _ in errors) / len(errors)
        inside = sum(error <= 1.645 * se for error, se in errors)
        print(f"{name}: mean error {mean:.3f}; {inside} of {len(errors)} bands hold the truth")
    draw(windows, truth, args.out)


if __name__ == "__main__":
    main()

"""Estimated held-out reward accuracy of a DPO run with 30 % swapped labels, beside the true one.

Usage: python recipes/dpo-noisy-qwen2.5-0.5b/against_truth.py [--out PNG] [--seed N]

The true one is that of 1,000 pairs with as many swapped labels, which the run never sees.
"""

import argparse
import random
import tempfile
from pathlib import Path

import matplotlib
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

from poprisk_integrations.cli.builtin import local_model
from poprisk_integrations.trl import PopRiskDPOConfig, PopRiskDPOTrainer

PAIRS, OTHERS, EPOCHS, SWAPPED, BATCH = 1500, 1000, 3, 0.3, 10
TRUE, ESTIMATED, TRAINING = "#222222", "#D55E00", "#0072B2"
# fmt: off
WORDS = (
    "arc", "ash", "bay", "bud", "cat", "cup", "den", "dew", "elm", "fog", "gum", "hay", "ice",
    "jay", "kin", "lot", "map", "net", "oak", "pea", "rye", "sea", "tin", "urn", "vow", "wax",
)
# fmt: on


def preferences(count: int, seed: int) -> Dataset:
    """The chosen completion has more words of the first half, unless the label is swapped."""
    draw, half = random.Random(seed), len(WORDS) // 2
    rows = []
    for _ in range(count):
        better, worse = (
            " " + " ".join(draw.choice(part if draw.random() < 0.5 else WORDS) for _ in range(5))
            for part in (WORDS[:half], WORDS[half:])
        )
        if draw.random() < SWAPPED:
            better, worse = worse, better
        prompt = " ".join(draw.choices(WORDS, k=3))
        rows.append({"prompt": prompt, "chosen": better, "rejected": worse})
    return Dataset.from_list(rows)


def run(seed: int) -> tuple[list[dict], list[dict]]:
    """Windows of the run, and what evaluations on other pairs say."""
    with tempfile.TemporaryDirectory() as directory:
        builtin = local_model("builtin:tiny-llama", Path(directory))
        tokenizer = AutoTokenizer.from_pretrained(builtin)
        models = []
        for _ in range(2):  # policy and reference
            set_seed(seed)
            config = LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=64,
                initializer_range=0.1,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
            models.append(LlamaForCausalLM(config))
        args = PopRiskDPOConfig(
            directory,
            optim="adamw_torch",
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=100,
            learning_rate=2e-3,
            lr_scheduler_type="linear",
            eval_strategy="steps",
            eval_steps=PAIRS // BATCH // 8,
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
        trainer = PopRiskDPOTrainer(
            *models,
            args,
            train_dataset=preferences(PAIRS, seed),
            eval_dataset=preferences(OTHERS, 1000 + seed),
            processing_class=tokenizer,
        )
        trainer.train()
    truth = [
        {"step": 0, "loss": 0.6931, "reward_accuracy": 0.5},
        *(
            {
                "step": line["step"],
                "loss": line["eval_loss"],
                "reward_accuracy": line["eval_poprisk/reward_accuracy"],
            }
            for line in trainer.state.log_history
            if "eval_loss" in line
        ),
    ]
    stop = next(c for c in trainer.callback_handler.callbacks if hasattr(c, "criterion_in_use"))
    return stop.history, truth


def draw(windows: list[dict], truth: list[dict], path: Path) -> None:
    """Loss and accuracy over the epochs: estimated with its 90 % band, true, training."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    per_epoch = windows[-1]["step"] / windows[-1]["epoch"]
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")
    for axis, name in zip(axes, ("loss", "reward_accuracy"), strict=True):
        ends = [row["epoch"] for row in windows]
        middles = [(a + b) / 2 for a, b in zip([0.0, *ends[:-1]], ends, strict=True)]
        value = [row[f"estimated_test_{name}"] for row in windows]
        error = [1.645 * row[f"estimated_test_{name}_se"] for row in windows]
        low, high = ([v + s * e for v, e in zip(value, error, strict=True)] for s in (-1, 1))
        steps = [row["step"] / per_epoch for row in truth]
        axis.plot(steps, [row[name] for row in truth], color=TRUE, lw=2, label="true, other pairs")
        axis.fill_between(middles, low, high, color=ESTIMATED, alpha=0.18, lw=0)
        axis.plot(middles, value, color=ESTIMATED, marker="o", ms=4, label="estimated (90 %)")
        train = [row[f"train_{name}"] for row in windows]
        axis.plot(middles, train, color=TRAINING, ls="--", label="training")
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("DPO loss, nats per pair")
    axes[1].set_ylabel("reward accuracy, labels as they are")
    axes[0].legend(fontsize=8, framealpha=0.9, edgecolor="none")
    figure.savefig(path, dpi=130)


def main() -> None:
    """Train, print the mean error, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("against_truth.png"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    windows, truth = run(args.seed)
    ends = [0, *(row["step"] for row in windows)]
    for name in ("loss", "reward_accuracy"):
        errors = []
        for row, start, end in zip(windows, ends[:-1], ends[1:], strict=True):
            inside = [one[name] for one in truth if start <= one["step"] <= end]
            error = abs(row[f"estimated_test_{name}"] - sum(inside) / len(inside))
            errors.append((error, row[f"estimated_test_{name}_se"]))
        mean = sum(error for error, _ in errors) / len(errors)
        held = sum(error <= 1.645 * se for error, se in errors)
        print(f"{name}: mean error {mean:.3f}; {held} of {len(errors)} bands hold the truth")
    draw(windows, truth, args.out)


if __name__ == "__main__":
    main()

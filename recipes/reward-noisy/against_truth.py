"""What a reward model says of pairs with 30 % swapped labels, beside what is known of them.

Usage: python recipes/reward-noisy/against_truth.py [--seeds N] [--picture PNG]

Prints, per seed: the noise rate, how well the flip report tells the swapped labels from the others,
and the estimated held-out accuracy beside that on 1,000 pairs which the run never sees. The picture
has the margins of the first seed's pairs and what the probabilities made of them are worth.
"""

import argparse
import random
import tempfile
from pathlib import Path

import matplotlib
from datasets import Dataset, disable_progress_bars
from sklearn.metrics import roc_auc_score
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification, set_seed

from poprisk_integrations.cli.builtin import local_model
from poprisk_integrations.core.calibration import reliability
from poprisk_integrations.trl import PopRiskRewardConfig, PopRiskRewardTrainer
from poprisk_integrations.trl.label_flips import flip_preferences

PAIRS, OTHERS, EPOCHS, SWAPPED, BATCH = 1500, 1000, 3, 0.3, 10
# fmt: off
WORDS = (
    "arc", "ash", "bay", "bud", "cat", "cup", "den", "dew", "elm", "fog", "gum", "hay", "ice",
    "jay", "kin", "lot", "map", "net", "oak", "pea", "rye", "sea", "tin", "urn", "vow", "wax",
)
# fmt: on


def preferences(count: int, seed: int) -> Dataset:
    """The chosen completion has more words of the first half, by and large."""
    draw, half = random.Random(seed), len(WORDS) // 2
    rows = []
    for _ in range(count):
        better, worse = (
            " " + " ".join(draw.choice(part if draw.random() < 0.5 else WORDS) for _ in range(5))
            for part in (WORDS[:half], WORDS[half:])
        )
        prompt = " ".join(draw.choices(WORDS, k=3))
        rows.append({"prompt": prompt, "chosen": better, "rejected": worse})
    return Dataset.from_list(rows)


def run(seed: int, directory: str) -> tuple[PopRiskRewardTrainer, list[int]]:
    """A trained reward model of 80 thousand parameters, and which labels were swapped."""
    data, swapped = flip_preferences(preferences(PAIRS, seed), SWAPPED, seed)
    others, _ = flip_preferences(preferences(OTHERS, 1000 + seed), SWAPPED, seed)
    tokenizer = AutoTokenizer.from_pretrained(local_model("builtin:tiny-llama", Path(directory)))
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
        id2label={0: "reward"},
    )
    args = PopRiskRewardConfig(
        directory,
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=100,
        learning_rate=2e-3,
        lr_scheduler_type="linear",
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
    trainer = PopRiskRewardTrainer(
        LlamaForSequenceClassification(config),
        args,
        train_dataset=data,
        eval_dataset=others,
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer, swapped


def draw(trainer: PopRiskRewardTrainer, swapped: list[int], path: Path) -> None:
    """Margins of right and of wrong labels, and what their probabilities are worth."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    table = trainer.flip_report().to_pandas()
    table = table[table["probability_wrong"].notna()].sort_values("margin")
    is_wrong = table["row"].isin(swapped)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")
    for truth, colour, name in ((False, "#0072b2", "right"), (True, "#d55e00", "wrong")):
        margins = table["margin"][is_wrong == truth]
        left.hist(margins, 40, range=(-1.6, 1.9), color=colour, alpha=0.6, label=f"label {name}")
    left.set(xlabel="margin before the pair was trained on", ylabel="pairs")
    left.legend(frameon=False, loc="upper right")
    twin = left.twinx()
    twin.plot(table["margin"], table["probability_wrong"], color="#222222", lw=2)
    twin.set(xlim=(-1.6, 1.9), ylim=(0, 1), ylabel="P(wrong)")
    bins = [one for one in reliability(table["probability_wrong"], is_wrong) if one.count]
    shares = [one.share for one in bins]
    ends = [
        [one.share - one.share_low for one in bins],
        [one.share_high - one.share for one in bins],
    ]
    right.plot([0, 1], [0, 1], color="0.6", lw=1)
    right.errorbar(
        [one.predicted for one in bins], shares, ends, fmt="o", color="#222222", capsize=3
    )
    right.set(xlabel="P(wrong), mean of a tenth of its range", ylabel="share that is wrong (95 %)")
    figure.savefig(path, dpi=130)


def main() -> None:
    """Train and print a line per seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    disable_progress_bars()
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as directory:
            trainer, swapped = run(seed, directory)
            true = trainer.evaluate()["eval_poprisk/reward_accuracy"]
            if seed == 0 and args.picture:
                draw(trainer, swapped, args.picture)
        table = trainer.flip_report().to_pandas()
        table = table[table["probability_wrong"].notna()]
        auc = roc_auc_score(table["row"].isin(swapped), table["probability_wrong"])
        log = {name: value for line in trainer.state.log_history for name, value in line.items()}
        rate, low, high = (log[f"poprisk/noise_rate{end}"] for end in ("", "_low", "_high"))
        held_out = "poprisk/estimated_test_reward_accuracy"
        print(
            f"seed {seed}: noise rate {rate:.2f} (95 % interval {low:.2f} to {high:.2f}), AUC of "
            f"the flip report {auc:.3f}, held-out accuracy {true:.2f}, estimated "
            f"{log[held_out]:.2f} +- {log[f'{held_out}_se']:.2f}"
        )


if __name__ == "__main__":
    main()

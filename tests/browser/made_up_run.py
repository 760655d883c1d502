"""Logs of runs that never were, in the formats of Trainer, TRL and Lightning's CSVLogger."""

import csv
import json
import math
import random
from pathlib import Path
from typing import Any

_QUANTITIES = ("open_fraction", "mean_gate", "update_norm_ratio")


def write_dpo_run(
    directory: Path, steps: int, every: int, *, groups: int = 3, seed: int = 0
) -> Path:
    """A run of PopRiskDPOTrainer with all that it logs, a stop, a noise rate and a flip report."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    rows, history = [], []
    for step in range(every, steps + 1, every):
        rows.append(_train_row(rng, step, steps, groups))
        if step % (10 * every) == 0:
            rows.append(_eval_row(step, steps))
            history.append({k: rows[-2].get(f"poprisk/{k}", 1.0) for k in _MEASURED})
            history[-1]["step"] = step
    rows.append({"step": steps, "train_loss": 0.31, "train_runtime": 5432.1, "total_flos": 1e15})
    onset = next((row["step"] for row in history if row["signal_ratio"] < 1), None)
    stop = {
        "stopped": True,
        "global_step": steps,
        "stop_step": steps,
        "onset_step": onset,
        "reason": f"stopped at step {steps}: made up (F = 0.9 < 1)",
        "diagnosis": "batches agree no more than noise does: memorising",
        "best_model_checkpoint": f"/somewhere/checkpoint-{steps}",
        "settings": {"kappa": 2.0, "threshold": 1.0},
        "history": history,
    }
    state = {
        "global_step": steps,
        "max_steps": steps + 100,
        "num_train_epochs": 3,
        "log_history": rows,
    }
    noise = {"rate": 0.2, "low": 0.15, "high": 0.26, "num_pairs": 400, "estimated_at_step": 7}
    _write(directory / "trainer_state.json", state)
    _write(directory / "poprisk_stop.json", stop)
    _write(directory / "poprisk_noise.json", {**noise, "loss": "off", "diagnosis": "20 % wrong"})
    _write(directory / "label_flips.json", {"rows": [0, 1, 5], "num_pairs": 40})
    _write(directory / "config.json", {"model_type": "llama", "transformers_version": "5.1.0"})
    write_flips(directory / "flip_report.csv", [f"pair-{index}" for index in range(40)])
    (directory / "README.md").write_text(_CARD)
    (directory / "training_args.bin").write_bytes(b"not even a pickle")
    return directory


_MEASURED = (
    "signal_ratio",
    "signal_ratio_se",
    "risk_decrease",
    "risk_decrease_se",
    "agreement",
    "agreement_se",
)
_CARD = """---
base_model: made/up
---

# Model Card

### Training hyperparameters

- learning_rate: 0.0001

### Framework versions

- TRL: 1.16.0
- Pytorch 2.13.0
"""


def _train_row(rng: random.Random, step: int, steps: int, groups: int) -> dict[str, Any]:
    t = step / steps
    ratio = 3 * math.exp(-3 * t)
    ours = {
        "open_fraction": 0.5 * math.exp(-2 * t),
        "mean_gate": 0.3 * math.exp(-2 * t),
        "update_norm_ratio": 0.8 - 0.3 * t,
        "closed_noise": 0.4 + 0.3 * t,
        "closed_zero_grad": 0.1,
        "effective_lr": 5e-5 * (1 - t),
        "skipped_nonfinite": 0.0,
        "signal_ratio": ratio,
        "signal_ratio_se": 0.1 * ratio,
        "risk_decrease": 0.01 * (1 - 2 * t),
        "risk_decrease_se": 0.002,
        "agreement": 0.3 * (1 - 1.2 * t),
        "agreement_se": 0.05,
        "kl_data": -2 * t + 0.1 * rng.random(),
        "margin_p10": -1 + t,
        "margin_p50": 2 * t,
        "margin_p50_clean": 2 * t,
        "margin_p50_suspect": t - 0.5,
        "reward_accuracy": 0.5 + 0.45 * t,
        "noise_rate": 0.2 + 0.01 * (t > 0.5),
        "noise_rate_low": 0.15,
        "noise_rate_high": 0.26,
        "flips_suspected": 3.0 + (t > 0.5),
        "flips_fitted": t,
    }
    row: dict[str, Any] = {f"poprisk/{name}": value for name, value in ours.items()}
    for group in range(groups):
        for name in _QUANTITIES:
            row[f"poprisk/group{group}/{name}"] = min(1.0, ours[name] * (1 + 0.1 * group))
    row |= {f"rewards/{name}": rng.gauss(t, 1) for name in ("chosen", "rejected", "margins")}
    row |= {f"logps/{name}": rng.gauss(-100, 5) for name in ("chosen", "rejected")}
    return row | {
        "step": step,
        "epoch": 3 * t,
        "loss": 0.7 * math.exp(-3 * t) + 0.05 * rng.random(),
        "grad_norm": 1 + rng.random(),
        "learning_rate": 1e-4 * (1 - t),
    }


def _eval_row(step: int, steps: int) -> dict[str, Any]:
    t = step / steps
    return {
        "step": step,
        "eval_loss": 0.6 * math.exp(-3 * t) + 0.3 * t * t,
        "eval_runtime": 1.0,
        "eval_poprisk/reward_accuracy": 0.5 + 0.2 * t,
        "eval_poprisk/margin_p50": t,
    }


def write_flips(path: Path, pair_ids: list[str]) -> None:
    """A flip report whose probabilities fall from 0.99 on; the last pair has none."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC)
        writer.writerow(["pair_id", "row", "probability_wrong", "margin", "step", "action"])
        for row, pair_id in enumerate(pair_ids[:-1]):
            p = 0.99 * (1 - row / len(pair_ids))
            action = "swap" if p >= 0.9 else "drop" if p >= 0.5 else "keep"
            writer.writerow([pair_id, row, p, -2.0 + row / 10, row, action])
        if pair_ids:
            file.write(f'"last",{len(pair_ids) - 1},,,-1,"unseen"\n')


def write_lightning_run(directory: Path) -> Path:
    """A run with CSVLogger and PopRiskEarlyStopping that had no window for its first two rows."""
    directory.mkdir(parents=True, exist_ok=True)
    names = ["epoch", "step", "train_loss", "val_loss", "val_acc", "lr-PopRiskAdamW"]
    names += ["poprisk/signal_ratio", "poprisk/signal_ratio_se", "poprisk/onset_step"]
    names += ["poprisk/agreement", "poprisk/agreement_se"]
    rows = [
        [0, 9, 2.0, "", "", 0.1, -1.0, -1.0, -1.0, 0.0, -1.0],
        [0, 19, 1.0, 1.5, 0.25, 0.1, -1.0, -1.0, -1.0, 0.0, -1.0],
        [1, 29, 0.5, "", "", 0.05, 2.0, 0.2, -1.0, -0.5, 0.1],
        [1, 39, 0.25, 1.75, 0.5, 0.05, 0.5, 0.1, 39.0, -0.25, 0.1],
    ]
    with (directory / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([names, *rows])
    (directory / "hparams.yaml").write_text("lr: 0.1\nmodel:\n  width: 64\n  layers: [1, 2]\n")
    return directory


def write_stop(directory: Path) -> dict[str, Any]:
    """A report of a stop, as Lightning's callback writes it, into the directory of a run."""
    report = {
        "stopped": True,
        "global_step": 39,
        "stop_step": 39,
        "onset_step": 39,
        "reason": "stopped at step 39: made up (F = 0.5 < 1)",
        "best_model_path": "",
        "setup": {"kappa": 2.0, "threshold": 1.0},
        "history": [
            {"step": 19, "signal_ratio": 2.0, "signal_ratio_se": 0.2, "agreement": None},
            {"step": 39, "signal_ratio": 0.5, "signal_ratio_se": 0.1, "agreement": -0.25},
        ],
    }
    _write(directory / "poprisk_stop.json", report)
    return report


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")

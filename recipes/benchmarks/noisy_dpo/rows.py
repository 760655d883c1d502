"""From shards to the rows of the results file: one per run and seed, all endpoints side by side.

An endpoint is an evaluated epoch, a stop (`onset`: windows of a third of an epoch and kappa 1, the
default of `PopRiskDPOTrainer`; `third`, `epoch`: windows of that length and kappa 2, that of the
callback), or the epoch of the smallest loss on pairs that were held out with their noise (`held`).
"""

import re
from pathlib import Path

import numpy as np
import torch
from estimates import estimate_of
from stops import at_epoch, stop_epochs
from training import EPOCHS

from poprisk_integrations.core import StoppingConfig

__all__ = [
    "CHOSEN",
    "ENDPOINTS",
    "METRICS",
    "SINGLE",
    "detection_auc",
    "rows_of_folder",
    "rows_of_shard",
    "second_half",
]

# Digits after the point: what the number of held-out pairs and samples is worth.
METRICS = {"accuracy": 3, "reward": 3, "kl": 2, "flipped_fitted": 2, "clean_fitted": 2}
SINGLE = ("noise_rate", "e_hat", "e_low", "e_high", "auc", "auc_late", "drift")
CHOSEN = ("onset", "third", "epoch", "held")
ENDPOINTS = (*map(str, EPOCHS), *CHOSEN)
NAME = re.compile(r"(?P<arm>\w+?)_lr(?P<lr>[^_]+)_beta(?P<beta>[^_]+)_(?P<schedule>[a-z]+)_.*")

Trace = dict[str, np.ndarray]


def rows_of_folder(folder: Path) -> list[dict]:
    """Rows of all shards; a seed that two shards have is taken once."""
    found: dict[tuple, dict] = {}
    for path in sorted(folder.glob("*_lr*.npz")):
        if path.name.endswith(".tmp.npz"):
            continue
        for row in rows_of_shard(path):
            key = tuple(row[name] for name in ("arm", "condition", "lr", "beta", "schedule"))
            found.setdefault((*key, row["seed"]), row)
    return [found[key] for key in sorted(found)]


def rows_of_shard(path: Path) -> list[dict]:
    """One row for each member of a run."""
    match = NAME.fullmatch(path.stem)
    if match is None:
        raise ValueError(f"Not a shard: {path}.")
    with np.load(path, allow_pickle=False) as file:
        trace = {name: file[name] for name in file.files}
    ends = {str(int(e)): np.full(len(trace["seed"]), e) for e in trace["epoch"] if e > 0}
    if match["schedule"] == "constant":
        ends |= {window: stop_epochs(trace, window) for window in ("third", "epoch")}
        ends["onset"] = stop_epochs(trace, "third", StoppingConfig(kappa=1.0))
    if "held_loss" in trace:
        ends["held"] = trace["epoch"][trace["held_loss"].argmin(0)]
    values = {
        (metric, end): at_epoch(trace, metric, epochs)
        for end, epochs in ends.items()
        for metric in METRICS
    }
    rows = []
    for member, seed in enumerate(trace["seed"]):
        row: dict = {
            "arm": match["arm"],
            "condition": str(trace["condition"][member]),
            "lr": float(match["lr"]),
            "beta": float(match["beta"]),
            "schedule": match["schedule"],
            "seed": int(seed),
            **_of_ledger(trace, member),
        }
        for name in CHOSEN:
            row[f"epoch of {name}"] = _text(ends[name][member], 1) if name in ends else ""
        row["drift"] = _text(trace["drift"][-1, member], 2)
        for metric, digits in METRICS.items():
            for end in ENDPOINTS:
                value = values.get((metric, end))
                row[f"{metric} {end}"] = "" if value is None else _text(value[member], digits)
        rows.append(row)
    return rows


def _of_ledger(trace: Trace, member: int) -> dict[str, str]:
    """Noise rate, its estimate, and how well margins before training tell wrong labels."""
    margins, flipped = trace["ledger"][member], trace["flipped"][member]
    found = estimate_of(torch.from_numpy(margins))
    late = second_half(int(trace["seed"][member]), np.isfinite(margins).sum())
    return {
        "noise_rate": _text(trace["noise_rate"][member], 3),
        "e_hat": _text(found.reference_rate, 3),
        "e_low": _text(found.low, 2),
        "e_high": _text(found.high, 2),
        "auc": _text(detection_auc(margins, flipped), 3),
        "auc_late": _text(detection_auc(margins[late], flipped[late]), 3),
    }


def second_half(seed: int, kept: int) -> np.ndarray:
    """Rows that the second half of the first epoch takes, as `training` orders them."""
    order = torch.randperm(int(kept), generator=torch.Generator().manual_seed(40_000 + seed))
    return order[int(kept) // 2 :].numpy()


def detection_auc(margins: np.ndarray, flipped: np.ndarray) -> float:
    """P(a wrong label's margin < a right one's), ties count half; NaN without both kinds.

    Args:
        margins: Shape (n,), NaN where there is none.
        flipped: Shape (n,), bool.
    """
    seen = np.isfinite(margins)
    wrong, right = margins[seen & flipped], np.sort(margins[seen & ~flipped])
    if not len(wrong) or not len(right):
        return float("nan")
    below = len(right) - np.searchsorted(right, wrong, side="right")
    tied = np.searchsorted(right, wrong, side="right") - np.searchsorted(right, wrong)
    return float((below + 0.5 * tied).mean() / len(right))


def _text(value: float, digits: int) -> str:
    """Short: .5 for 0.5, and nothing where there is no number."""
    if not np.isfinite(value):
        return ""
    return re.sub(r"^(-?)0\.", r"\1.", f"{value:.{digits}f}")

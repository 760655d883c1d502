"""Does finding wrong labels out of fold end in a better model? See README.md for the rule.

Traces (one JSON per setting and arm) are read back, so a run that was cut goes on.
"""

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from benchmarks.cleaned_pairs.pairs import Sizes, Task, build
from benchmarks.cleaned_pairs.sft import references
from benchmarks.cleaned_pairs.training import Run, accuracy, dpo, filled, judged, margins_of
from benchmarks.harness.figures import COLOURS, legend, plt, save
from benchmarks.harness.provenance import hardware, read_csv, result_name, write_csv
from benchmarks.harness.tables import interval
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn.functional import softplus

from poprisk_integrations.core.noise_rate import (
    UntrainedMargins,
    estimate_noise_rate,
    flip_probability,
)

TAKES = ("selection", "seeds", "traces", "arms", "part")
PARTS = ("structured",)
SELECTION, FRESH = (100, 101, 102), (0, 1, 2, 3, 4)
FOLDS = 4


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Members that train side by side: a data set for each condition and seed."""

    name: str
    conditions: tuple[str, ...]
    run: Run
    pairs: int = 960

    @property
    def key(self) -> str:
        """For files."""
        run = self.run
        return f"{self.name}_{self.pairs}_{run.lr:g}_{run.schedule}_{run.epochs}"


def _linear(lr: float) -> Run:
    return Run(lr=lr, schedule="linear", epochs=6)


FLIPS = ("flips 0", "flips 30")
SETTINGS = (
    *(Setting(name="flips", conditions=FLIPS, run=_linear(lr)) for lr in (1e-4, 3e-4, 1e-3, 3e-3)),
    Setting(name="flips", conditions=FLIPS, run=Run(lr=1e-3, schedule="constant", epochs=8)),
    *(Setting(name="few", conditions=FLIPS, run=_linear(lr), pairs=320) for lr in (3e-4, 1e-3)),
)
CHOSEN_ON = (
    *(Setting(name="flips", conditions=("flips 30",), run=_linear(lr)) for lr in (3e-4, 1e-3)),
    Setting(
        name="flips", conditions=("flips 30",), run=Run(lr=1e-3, schedule="constant", epochs=8)
    ),
)
STRUCTURED = tuple(
    Setting(name="structured", conditions=("length", "annotators"), run=_linear(lr))
    for lr in (3e-4, 3e-3)
)
ARMS = ("plain", "hold-out", "drop", "mean of folds", "oracle")
MORE = (
    "drop, mean of folds",
    "drop surest",
    "swap surest",
    "posterior",
    "mean of 2 folds",
    "mean of 8 folds",
)
QUICK = Setting(
    name="flips", conditions=FLIPS, run=Run(lr=1e-3, schedule="linear", epochs=2), pairs=96
)


def main(args: argparse.Namespace) -> list[str]:
    """Train what is missing, write tables and the picture; the verdict."""
    torch.set_num_threads(1)
    seeds = tuple(
        args.seeds or (SELECTION if args.selection else FRESH)[: 1 if args.quick else None]
    )
    settings = CHOSEN_ON if args.selection else STRUCTURED if args.part else SETTINGS
    if args.quick:
        settings = (replace(QUICK, name=settings[0].name, conditions=settings[0].conditions),)
    arms = args.arms or [*ARMS, *(MORE if args.selection else ())]
    folder = args.traces or (args.out if args.quick else Path(__file__).parent) / "traces"
    models = references(list(seeds), folder / "sft", 640 if args.quick else 20_000)
    rows = []
    for setting in settings:
        waits = [arm for arm in arms if not _trace(folder, setting, arm, seeds).exists()]
        if waits:
            sizes = Sizes(train=setting.pairs)
            if args.quick:
                sizes = replace(sizes, held=40, candidates=1.6)
            _record(
                setting,
                build(list(setting.conditions), list(seeds), models, sizes),
                waits,
                folder,
                seeds,
            )
        for arm in arms:
            rows += json.loads(_trace(folder, setting, arm, seeds).read_text(encoding="utf-8"))
    stem = args.out / f"{'selection_' if args.selection else ''}{result_name()}"
    if args.part:
        stem = args.out / f"{args.part}_{hardware()}"
    write_csv(stem.with_suffix(".csv"), rows)
    summary = summary_rows(rows)
    write_csv(stem.with_name(f"summary_{stem.name}.csv"), summary)
    draw(rows, stem.with_suffix(".png"))
    return verdict(summary) + (ranking_against_flips(rows) if args.part else [])


def _trace(folder: Path, setting: Setting, arm: str, seeds: tuple[int, ...]) -> Path:
    name = arm.replace(", ", "_").replace(" ", "-")
    return folder / f"{setting.key}_{name}_{seeds[0]}-{seeds[-1]}.json"


def _record(
    setting: Setting, task: Task, arms: list[str], folder: Path, seeds: tuple[int, ...]
) -> None:
    run, n = setting.run, setting.pairs
    everything = torch.arange(n).expand(len(task.seeds), n)
    found: dict[str, tuple] = {}  # margins, mean, ends of the folds by their number

    def folds(count: int) -> tuple:
        if count not in found:
            found[count] = judged(task, run, count)
        return found[count]

    def end(rows: Tensor, p_right: Tensor | None = None) -> Tensor:
        *_, params = dpo(task, run, rows, p_right)
        return accuracy(params, task)

    for arm in arms:
        more: list[dict] = [{} for _ in task.seeds]
        if arm == "plain":
            score = end(everything)
        elif arm == "hold-out":
            score, epochs = _held_out(task, run, n)
            more = [{"epochs": int(epoch)} for epoch in epochs]
        elif arm == "oracle":
            score = end(filled(everything, ~task.flipped))
        elif arm.startswith("mean of"):
            count = int(arm.split()[2]) if arm.split()[2].isdecimal() else FOLDS
            margins, mean, ends = folds(count)
            score = accuracy(mean, task)
            more = [
                {**one, "epochs": f"{ends[:, m].float().mean():.2f}"}
                for m, one in enumerate(_ranking(margins, task))
            ]
        else:
            p_wrong = _probability_wrong(folds(FOLDS)[0])
            if arm == "posterior":
                score = end(everything, (1 - p_wrong).float())
            elif arm == "swap surest":
                score = end(everything, (p_wrong < 0.9).float())
            elif arm == "drop, mean of folds":
                score = accuracy(judged(task, run, FOLDS, kept=p_wrong < 0.5)[1], task)
            else:
                score = end(filled(everything, p_wrong < (0.9 if "surest" in arm else 0.5)))
        rows = [
            {
                "setting": setting.name,
                "pairs": n,
                "condition": task.conditions[m],
                "lr": f"{run.lr:g}",
                "schedule": run.schedule,
                "epochs_planned": run.epochs,
                "seed": task.seeds[m],
                "arm": arm,
                "accuracy": f"{score[m]:.4f}",
                **{"auc": "", "precision": "", "suspects": "", "rate": "", "low": "", "high": ""},
                "epochs": "",
                **more[m],
            }
            for m in range(len(task.seeds))
        ]
        path = _trace(folder, setting, arm, seeds)
        path.with_suffix(".tmp").write_text(json.dumps(rows), encoding="utf-8")
        path.with_suffix(".tmp").replace(path)
        print(f"{setting.key} {arm}: {score.mean():.3f}", flush=True)


def _held_out(task: Task, run: Run, n: int) -> tuple[Tensor, Tensor]:
    """Accuracy at the epoch of the least loss on a tenth of the pairs, with their noise."""
    orders = [torch.randperm(n, generator=torch.Generator().manual_seed(7 + s)) for s in task.seeds]
    held, rest = torch.stack(orders).split([n // 10, n - n // 10], 1)
    losses, scores = [], []
    for params in dpo(task, run, rest):
        losses.append(softplus(-margins_of(params, task, held)).mean(1))
        scores.append(accuracy(params, task))
    best = torch.stack(losses).argmin(0)
    return torch.stack(scores).gather(0, best[None])[0], best + 1


def _probability_wrong(margins: Tensor) -> Tensor:
    """Shape (M, n): as the flip report has it."""
    found = []
    for own in margins:
        estimate = _estimate(own)
        found.append(flip_probability(own, estimate.reference_rate, estimate.slope))
    return torch.stack(found)


def _estimate(margins: Tensor):
    record = UntrainedMargins(len(margins))
    record.record(torch.arange(len(margins)), margins, step=1)
    return estimate_noise_rate(record)


def _ranking(margins: Tensor, task: Task) -> list[dict]:
    """How well the margins tell wrong labels, for each member."""
    found = []
    for own, wrong, p in zip(margins, task.flipped, _probability_wrong(margins), strict=True):
        suspect, estimate = p >= 0.5, _estimate(own)
        is_mixed = bool(wrong.any()) and not bool(wrong.all())
        hits = float((suspect & wrong).sum())
        found.append(
            {
                "auc": f"{roc_auc_score(wrong, -own):.4f}" if is_mixed else "",
                "precision": f"{hits / int(suspect.sum()):.4f}" if suspect.any() else "",
                "suspects": f"{suspect.float().mean():.4f}",
                "rate": "" if estimate.rate is None else f"{estimate.rate:.4f}",
                "low": f"{estimate.low:.4f}",
                "high": f"{estimate.high:.4f}",
            }
        )
    return found


GROUPS = {  # of the summary: condition, setting and schedule that are averaged over rates
    "30 % wrong": ("flips 30", "flips", "linear"),
    "30 % wrong, constant rate": ("flips 30", "flips", "constant"),
    "none wrong": ("flips 0", "flips", "linear"),
    "none wrong, constant rate": ("flips 0", "flips", "constant"),
    "320 pairs, 30 % wrong": ("flips 30", "few", "linear"),
    "320 pairs, none wrong": ("flips 0", "few", "linear"),
    "longer wins": ("length", "structured", "linear"),
    "a bad annotator": ("annotators", "structured", "linear"),
}


def summary_rows(rows: list[dict]) -> list[dict]:
    """Mean accuracy of each arm and group, and its paired differences to two of them."""
    found = []
    for group, where in GROUPS.items():
        own = [r for r in rows if (r["condition"], r["setting"], r["schedule"]) == where]
        cells = {(r["arm"], r["lr"], r["seed"]): float(r["accuracy"]) for r in own}
        for arm in dict.fromkeys(r["arm"] for r in own):
            keys = [(lr, seed) for name, lr, seed in cells if name == arm]
            values = [cells[(arm, *key)] for key in keys]
            rates = sorted({lr for lr, _ in keys}, key=float)
            by_rate = [np.mean([cells[(arm, *k)] for k in keys if k[0] == lr]) for lr in rates]
            row = {
                "group": group,
                "arm": arm,
                "accuracy": f"{np.mean(values):.4f}",
                "worst_rate": f"{min(by_rate):.4f}",
            }
            for base in ("plain", "hold-out"):
                paired = {k: cells[(arm, *k)] - cells[(base, *k)] for k in keys}
                # A seed has the same pairs at all rates, so its rates are one observation.
                seeds = {seed for _, seed in keys}
                by_seed = {("", s): np.mean([paired[k] for k in keys if k[1] == s]) for s in seeds}
                mean, low, high = interval(by_seed)
                row |= {f"minus_{base}": f"{mean:.4f}", f"{base}_low": f"{low:.4f}"}
                row |= {f"{base}_high": f"{high:.4f}"}
                worst = [np.mean([paired[k] for k in keys if k[0] == lr]) for lr in rates]
                row[f"{base}_worst_rate"] = f"{min(worst):.4f}"
            for name in ("auc", "precision"):
                known = [float(r[name]) for r in own if r["arm"] == arm and r[name] != ""]
                row[name] = f"{np.mean(known):.3f}" if known else ""
            found.append(row)
    return found


def verdict(summary: list[dict]) -> list[str]:
    """The decision rule of the README, applied."""
    lines = []
    for row in summary:
        if row["arm"] not in ("drop", "mean of folds", "drop, mean of folds"):
            continue
        lines.append(
            f"{row['group']}, {row['arm']}: {float(row['accuracy']):.3f}; minus plain "
            f"{float(row['minus_plain']):+.3f} [{float(row['plain_low']):+.3f}, "
            f"{float(row['plain_high']):+.3f}], minus hold-out {float(row['minus_hold-out']):+.3f} "
            f"[{float(row['hold-out_low']):+.3f}, {float(row['hold-out_high']):+.3f}]"
        )
    return lines


def ranking_against_flips(rows: list[dict]) -> list[str]:
    """AUC of structured noise minus that of random flips at the same rates, by seed."""
    (table,) = (Path(__file__).parent / "results").glob("2*.csv")

    def by_seed(some: list[dict], group: str) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        for r in some:
            is_wanted = r["arm"] == "mean of folds" and _where(r) == GROUPS[group]
            if is_wanted and r["lr"] in {row["lr"] for row in rows}:
                found.setdefault(str(r["seed"]), []).append(float(r["auc"]))
        return found

    flips, lines = by_seed(read_csv(table), "30 % wrong"), []
    for group in ("longer wins", "a bad annotator"):
        own = by_seed(rows, group)
        paired = {("", s): np.mean(v) - np.mean(flips[s]) for s, v in own.items() if s in flips}
        if paired:
            mean, low, high = interval(paired)
            lines.append(
                f"{group}: AUC {np.mean(list(own.values())):.3f}, minus random flips {mean:+.3f} "
                f"[{low:+.3f}, {high:+.3f}]"
            )
    return lines


def draw(rows: list[dict], path: Path) -> None:
    """Accuracy over learning rate in each group; means over seeds, and the seeds."""
    groups = [g for g, w in GROUPS.items() if any(_where(r) == w for r in rows)]
    columns = min(4, len(groups)) or 1
    lines = -(-len(groups) // columns) or 1
    figure, axes = plt.subplots(
        lines, columns, figsize=(3.1 * columns + 0.6, 2.7 * lines + 0.7), sharey=True,
        layout="constrained", squeeze=False,
    )  # fmt: skip
    arms = list(dict.fromkeys(r["arm"] for r in rows))
    for axis, group in zip(axes.flat, groups, strict=False):
        own = [r for r in rows if _where(r) == GROUPS[group]]
        rates = sorted({float(r["lr"]) for r in own})
        for place, arm in enumerate(arms):
            found = [
                [float(r["accuracy"]) for r in own if r["arm"] == arm and float(r["lr"]) == lr]
                for lr in rates
            ]
            shift = 1.03 ** (place - len(arms) / 2)
            at = [lr * shift for lr in rates]
            colour = COLOURS[place % len(COLOURS)]
            axis.plot(at, [np.mean(v) for v in found], "o-", color=colour, label=arm, ms=4, lw=1.3)
            for x, values in zip(at, found, strict=True):
                axis.scatter([x] * len(values), values, color=colour, s=6, alpha=0.35, lw=0)
        axis.set(title=group, xscale="log", xlabel="learning rate")
        axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axis.minorticks_off()
        axis.grid(axis="y", alpha=0.3)
    for axis in axes.flat[len(groups) :]:
        axis.axis("off")
    for axis in axes[:, 0]:
        axis.set_ylabel("clean held-out accuracy")
    legend(figure, axes.flat[0], loc="lower center", ncols=min(len(arms), 6))
    save(figure, path)


def _where(row: dict) -> tuple[str, str, str]:
    return row["condition"], row["setting"], row["schedule"]

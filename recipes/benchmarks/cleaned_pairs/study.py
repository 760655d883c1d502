"""Does finding wrong labels out of fold end in a better model? See README.md for the rule.

Traces (one JSON per setting and arm) are read back, so a run that was cut goes on.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from benchmarks.cleaned_pairs import ranking
from benchmarks.cleaned_pairs.pairs import Sizes, Task, build
from benchmarks.cleaned_pairs.posterior import probability_wrong, told
from benchmarks.cleaned_pairs.settings import (
    CHOSEN_ON,
    FRESH,
    QUICK,
    SELECTION,
    SETTINGS,
    STRUCTURED,
    Setting,
)
from benchmarks.cleaned_pairs.sft import references
from benchmarks.cleaned_pairs.tables import draw, ranking_against_flips, summary_rows, verdict
from benchmarks.cleaned_pairs.training import Run, accuracy, dpo, filled, judged, margins_of
from benchmarks.harness.provenance import hardware, result_name, write_csv
from torch import Tensor
from torch.nn.functional import softplus

TAKES = ("selection", "seeds", "traces", "arms", "part")
PARTS = ("ranking", "structured")
FOLDS = 4
ARMS = ("plain", "hold-out", "drop", "mean of folds", "oracle")
MORE = (
    "drop, mean of folds",
    "drop surest",
    "swap surest",
    "posterior",
    "mean of 2 folds",
    "mean of 8 folds",
)


def main(args: argparse.Namespace) -> list[str]:
    """Train what is missing, write tables and the picture; the verdict."""
    torch.set_num_threads(1)
    if args.part == "ranking":
        return ranking.main(args)
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
                for m, one in enumerate(told(margins, task))
            ]
        else:
            p_wrong = probability_wrong(folds(FOLDS)[0])
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

"""What ranks wrong labels better than the margins of four folds? See README.md, rule 6.

A *judge* has margins of all pairs from models that did not see them; a *ranking* is made of one
judge or several. Margins are kept in traces: a run that was cut goes on, and rankings cost nothing.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from benchmarks.cleaned_pairs.language import lengths
from benchmarks.cleaned_pairs.model import WIDTH, Params
from benchmarks.cleaned_pairs.pairs import Sizes, Task, build
from benchmarks.cleaned_pairs.posterior import (
    doubt_by_reasons,
    estimate,
    probability_wrong,
    weighed,
)
from benchmarks.cleaned_pairs.settings import (
    FRESH,
    QUICK,
    SELECTION,
    SETTINGS,
    STRUCTURED,
    Setting,
)
from benchmarks.cleaned_pairs.sft import references
from benchmarks.cleaned_pairs.training import Run, accuracy, judged, parts, reward_margin
from benchmarks.harness.figures import COLOURS, plt, save
from benchmarks.harness.provenance import hardware, write_csv
from benchmarks.harness.tables import interval
from sklearn.metrics import roc_auc_score
from torch import Tensor

__all__ = ["main"]

REWARD_LR = 3e-3  # better on the selection seeds than 1e-3
BASE, BOUND, FOLDS = "4 folds", "trained on right labels", 4
ONE_CONDITION = [
    replace(one, conditions=("flips 30",)) for one in SETTINGS if one.run.schedule == "linear"
]
CHOSEN_ON = [one for one in ONE_CONDITION if one.run.lr in (3e-4, 1e-3)]
CONFIRMED_ON = [*ONE_CONDITION, STRUCTURED[0]]
GROUPS = {  # condition and setting
    "960 pairs": ("flips 30", "flips"),
    "320 pairs": ("flips 30", "few"),
    "longer wins": ("length", "structured"),
    "a bad annotator": ("annotators", "structured"),
}


class Judges:
    """Of one setting: margins of shape (M, n), and the mean of the models that made them."""

    def __init__(self, task: Task, run: Run, folder: Path) -> None:
        self.task, self.run = task, run
        self._folder = folder
        self._found: dict[str, tuple[Tensor, Params]] = {}

    def __call__(self, name: str) -> tuple[Tensor, Params]:
        """Trained, or read back. The mean of reward models is empty."""
        path = self._folder / f"{name.replace(' ', '-')}.npz"
        if name not in self._found and not path.exists():
            margins, mean = self._judge(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp.npz")
            arrays = {key: p.numpy() for key, p in mean.items()}
            np.savez(temporary, **arrays, margins=margins.numpy())
            temporary.replace(path)
        if name not in self._found:
            with np.load(path, allow_pickle=False) as file:
                mean = {key: torch.from_numpy(file[key]) for key in file.files}
            self._found[name] = (mean.pop("margins"), mean)
        return self._found[name]

    def _judge(self, name: str) -> tuple[Tensor, Params]:
        task, run = self.task, self.run
        if name == "reward model":
            start = {k: p for k, p in task.reference.items() if k != "head"}
            start["score"] = torch.zeros(len(task.seeds), WIDTH)
            own, run = replace(task, reference=start), replace(run, lr=REWARD_LR)
            return judged(own, run, FOLDS, margin=reward_margin)[0], {}
        if name == BOUND:
            return judged(task, run, FOLDS, kept=~task.flipped)[:2]
        if name in ("suspects left out", "weighted"):
            p_wrong = probability_wrong(self(BASE)[0])
            if name == "weighted":
                return judged(task, run, FOLDS, (1 - p_wrong).float())[:2]
            return judged(task, run, FOLDS, kept=p_wrong < 0.5)[:2]
        folds, *times = name.split(" folds")
        partition = int(times[0] or 0)
        return judged(task, run, int(folds), partition=partition)[:2]


def _scaled(margins: Tensor) -> Tensor:
    return margins / margins.square().mean(1, keepdim=True).sqrt()


def _mean(margins: list[Tensor], task: Task) -> Tensor:
    return torch.stack([_scaled(h) for h in margins]).mean(0)


def _least_doubt(margins: list[Tensor], task: Task) -> Tensor:
    return torch.stack([_scaled(h) for h in margins]).amax(0)


def _product(margins: list[Tensor], task: Task) -> Tensor:
    """Log-odds of the product of the judges' posteriors, up to a constant."""
    slopes = [torch.tensor([[estimate(own).slope] for own in h]) for h in margins]
    return torch.stack([k * h for k, h in zip(slopes, margins, strict=True)]).sum(0)


def _fold_of(task: Task) -> Tensor:
    fold = torch.zeros(task.flipped.shape, dtype=torch.int64)
    for place, (_, held) in enumerate(parts(task, FOLDS)):
        fold.scatter_(1, held, place)
    return fold


def _unit_folds(margins: list[Tensor], task: Task) -> Tensor:
    """The margins of each fold in units of their own size."""
    (h,), fold = margins, _fold_of(task)
    squares = torch.stack([(h.square() * (fold == k)).sum(1) for k in range(FOLDS)], 1)
    counts = torch.stack([(fold == k).sum(1) for k in range(FOLDS)], 1)
    return h / (squares / counts).sqrt().gather(1, fold)


def _features(task: Task) -> Tensor:
    """Length and log-probability under the reference, chosen minus rejected, shape (M, n, 2)."""
    longer = (lengths(task.chosen) - lengths(task.rejected)).double()
    return torch.stack([longer, task.reference_margin.double()], -1)


def _with_features(margins: list[Tensor], task: Task) -> Tensor:
    x = torch.cat([torch.stack(margins, -1), _features(task)], -1)
    return torch.stack([weighed(*one) for one in zip(x, _fold_of(task), strict=True)])


def _weighed_alone(margins: list[Tensor], task: Task) -> Tensor:
    x = torch.stack(margins, -1)
    return torch.stack([weighed(*one) for one in zip(x, _fold_of(task), strict=True)])


def _by_reasons(margins: list[Tensor], task: Task) -> Tensor:
    annotator = torch.nn.functional.one_hot(task.annotator).double()
    columns = (margins[0], _features(task), annotator, _fold_of(task))
    return torch.stack([doubt_by_reasons(*one) for one in zip(*columns, strict=True)])


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """How labels are ranked: the larger the score, the less in doubt."""

    trainings: int
    judges: tuple[str, ...]
    score: Callable[[list[Tensor], Task], Tensor] = _mean


def _times(folds: int, times: int) -> tuple[str, ...]:
    return tuple(f"{folds} folds{f' {k}' if k else ''}" for k in range(times))


BOTH = (BASE, "reward model")
RANKINGS = {
    BASE: Ranking(trainings=3, judges=(BASE,)),
    "each fold in units of its size": Ranking(trainings=3, judges=(BASE,), score=_unit_folds),
    "4 folds, 2 partitions": Ranking(trainings=6, judges=_times(4, 2)),
    "2 folds, 3 partitions": Ranking(trainings=3, judges=_times(2, 3)),
    "2 folds, 6 partitions": Ranking(trainings=6, judges=_times(2, 6)),
    "suspects left out": Ranking(trainings=6, judges=("suspects left out",)),
    "suspects left out, both rounds": Ranking(trainings=6, judges=(BASE, "suspects left out")),
    "weighted": Ranking(trainings=6, judges=("weighted",)),
    "weighted, both rounds": Ranking(trainings=6, judges=(BASE, "weighted")),
    "reward model": Ranking(trainings=3, judges=("reward model",)),
    "policy and reward model": Ranking(trainings=6, judges=BOTH),
    "product of both posteriors": Ranking(trainings=6, judges=BOTH, score=_product),
    "both must doubt": Ranking(trainings=6, judges=BOTH, score=_least_doubt),
    "both, weighed": Ranking(trainings=6, judges=BOTH, score=_weighed_alone),
    "both and features, weighed": Ranking(trainings=6, judges=BOTH, score=_with_features),
    "features, weighed": Ranking(trainings=3, judges=(BASE,), score=_with_features),
    "features in the rate": Ranking(trainings=3, judges=(BASE,), score=_by_reasons),
    BOUND: Ranking(trainings=3, judges=(BOUND,)),
}
CONFIRMED = ("2 folds, 3 partitions", "2 folds, 6 partitions")  # the second was chosen


def main(args: argparse.Namespace) -> list[str]:
    """Train the judges that are missing, rank, write tables and the picture; the verdict."""
    seeds = tuple(args.seeds or (SELECTION if args.selection else FRESH))
    settings = CHOSEN_ON if args.selection else CONFIRMED_ON
    names = args.arms or (list(RANKINGS) if args.selection else [BASE, *CONFIRMED])
    if args.quick:
        seeds, names = seeds[:1], list(RANKINGS)
        settings = [replace(QUICK, conditions=("flips 30",))]
    folder = args.traces or (args.out if args.quick else Path(__file__).parent) / "traces"
    models = references(list(seeds), folder / "sft", 640 if args.quick else 20_000)
    rows = []
    for setting in settings:
        sizes = Sizes(train=setting.pairs)
        if args.quick:
            sizes = replace(sizes, held=40, candidates=1.6)
        task = build(list(setting.conditions), list(seeds), models, sizes)
        key = f"{setting.key}_{seeds[0]}-{seeds[-1]}"
        rows += _rows(setting, Judges(task, setting.run, folder / "judges" / key), names)
    stem = args.out / f"{'selection_' if args.selection else ''}ranking_{hardware()}"
    write_csv(stem.with_suffix(".csv"), rows)
    summary = summary_rows(rows)
    write_csv(stem.with_name(f"summary_{stem.name}.csv"), summary)
    draw(summary, stem.with_suffix(".png"))
    return verdict(summary)


def _rows(setting: Setting, judges: Judges, names: list[str]) -> list[dict]:
    task, rows = judges.task, []
    for name in names:
        one = RANKINGS[name]
        found = [judges(judge) for judge in one.judges]
        score = one.score([margins for margins, _ in found], task)
        clean = [""] * len(task.seeds)
        if one.score is _mean and all(mean for _, mean in found):
            means = [mean for _, mean in found]
            whole = {k: torch.stack([m[k] for m in means]).mean(0) for k in means[0]}
            clean = [f"{value:.4f}" for value in accuracy(whole, task)]
        rows += [
            {
                "setting": setting.name,
                "pairs": setting.pairs,
                "condition": task.conditions[m],
                "lr": f"{setting.run.lr:g}",
                "seed": task.seeds[m],
                "ranking": name,
                "trainings": one.trainings,
                "auc": f"{roc_auc_score(task.flipped[m], -score[m]):.4f}",
                "wrong": f"{task.noise_rate[m]:.4f}",
                **_interval(score[m]),
                "accuracy_of_mean": clean[m],
            }
            for m in range(len(task.seeds))
        ]
        print(f"{setting.key} {name}", flush=True)
    return rows


def _interval(score: Tensor) -> dict[str, str]:
    found = estimate(score)
    rate = "" if found.rate is None else f"{found.rate:.4f}"
    return {"rate": rate, "low": f"{found.low:.4f}", "high": f"{found.high:.4f}"}


def summary_rows(rows: list[dict]) -> list[dict]:
    """Mean AUC of each ranking and group, and its paired difference to the four folds."""
    found = []
    for group, where in GROUPS.items():
        own = [r for r in rows if (r["condition"], r["setting"]) == where]
        cells = {(r["ranking"], r["lr"], r["seed"]): float(r["auc"]) for r in own}
        for name in dict.fromkeys(r["ranking"] for r in own):
            keys = [(lr, seed) for ranking, lr, seed in cells if ranking == name]
            # A seed has the same pairs at all rates, so its rates are one observation.
            by_seed = {
                ("", seed): np.mean(
                    [cells[(name, *k)] - cells[(BASE, *k)] for k in keys if k[1] == seed]
                )
                for seed in dict.fromkeys(seed for _, seed in keys)
            }
            mean, low, high = interval(by_seed)
            clean = [r["accuracy_of_mean"] for r in own if r["ranking"] == name]
            shown = f"{np.mean(list(map(float, clean))):.4f}" if clean[0] else ""
            found.append(
                {
                    "group": group,
                    "ranking": name,
                    "trainings": RANKINGS[name].trainings,
                    "auc": f"{np.mean([cells[(name, *k)] for k in keys]):.4f}",
                    "minus_4_folds": f"{mean:.4f}",
                    "low": f"{low:.4f}",
                    "high": f"{high:.4f}",
                    "accuracy_of_mean": shown,
                }
            )
    return found


def verdict(summary: list[dict]) -> list[str]:
    """A line for each ranking, those of the largest gain first."""
    lines = []
    for name in dict.fromkeys(row["ranking"] for row in summary):
        own = [row for row in summary if row["ranking"] == name]
        by_group = "; ".join(
            f"{r['group']} {float(r['auc']):.3f} ({float(r['minus_4_folds']):+.3f} "
            f"[{float(r['low']):+.3f}, {float(r['high']):+.3f}])"
            for r in own
        )
        flips = [r for r in own if r["group"].endswith("pairs")]
        gain = np.mean([float(r["minus_4_folds"]) for r in flips])
        lines.append((gain, f"{name} ({own[0]['trainings']} trainings) {gain:+.4f}: {by_group}"))
    return [line for _, line in sorted(lines, reverse=True)]


def draw(summary: list[dict], path: Path) -> None:
    """Difference of AUC to the four folds with its interval; coloured by price."""
    groups = list(dict.fromkeys(row["group"] for row in summary))
    names = [n for n in dict.fromkeys(row["ranking"] for row in summary) if n != BASE]
    figure, axes = plt.subplots(
        1, len(groups), figsize=(2.9 * len(groups) + 2.4, 0.26 * len(names) + 1.5), sharey=True,
        layout="constrained", squeeze=False,
    )  # fmt: skip
    for axis, group in zip(axes.flat, groups, strict=True):
        own = {row["ranking"]: row for row in summary if row["group"] == group}
        for place, name in enumerate(names):
            mean, low, high = (float(own[name][key]) for key in ("minus_4_folds", "low", "high"))
            colour = COLOURS[min(own[name]["trainings"] // 3, 2)]
            axis.plot([low, high], [place, place], color=colour, lw=2)
            axis.plot([mean], [place], "o", color=colour, ms=5)
        base = float(own[BASE]["auc"])
        axis.axvline(0, color=COLOURS[0], lw=0.8)
        axis.set(title=group, xlabel=f"AUC minus that of four folds ({base:.3f})")
        axis.set_yticks(range(len(names)), names)
        axis.grid(axis="x", alpha=0.3)
    axes[0, 0].set_ylim(len(names) - 0.5, -0.5)
    save(figure, path)

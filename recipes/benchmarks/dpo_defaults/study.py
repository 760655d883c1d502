"""Do the defaults of PopRiskDPOTrainer cost anything anywhere? See README.md for the rule.

Each run is a trainer of its own; traces (one JSON per run) are read back, so a run that was cut
goes on.
"""

import argparse
import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from benchmarks.cleaned_pairs.language import LONGEST, all_prompts, reward
from benchmarks.cleaned_pairs.model import Params, sample
from benchmarks.cleaned_pairs.pairs import GAP, Sizes, Task, build, log_probs_of
from benchmarks.cleaned_pairs.sft import references
from benchmarks.dpo_defaults.real import pairs_of, stacked, trained
from benchmarks.harness.figures import COLOURS, legend, plt, save
from benchmarks.harness.provenance import result_name, write_csv
from benchmarks.harness.tables import interval
from torch import Tensor
from transformers import TrainerCallback

TAKES = ("selection", "seeds", "traces", "arms", "only")
SELECTION, FRESH = (100, 101, 102), (0, 1, 2, 3, 4)
KINDS = {
    "flips 0": "none wrong",
    "flips 30": "30 % wrong",
    "length": "longer wins",
    "annotators": "a bad annotator",
}
SIGNALS = {"strong": 960, "weak": 320}  # pairs
HARM, OVERFITS = 0.005, 0.02


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is trained on, and how."""

    kind: str
    signal: str
    lr: float
    schedule: str
    epochs: int

    @property
    def key(self) -> str:
        """For files and `--only`."""
        kind = self.kind.replace(" ", "")
        return f"{kind}_{self.signal}_{self.lr:g}_{self.schedule}_{self.epochs}"


RUNS = ((1e-4, "linear", 3), (3e-3, "linear", 3), (1e-3, "constant", 6))
CELLS = [
    Cell(kind=kind, signal=signal, lr=lr, schedule=schedule, epochs=epochs)
    for kind in KINDS
    for signal in SIGNALS
    for lr, schedule, epochs in RUNS
]
CHOSEN_ON = [cell for cell in CELLS if cell.kind.startswith("flips")]


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Clean pairs of a seed that nobody trains on; a member axis of one."""

    prompts: Tensor
    better: Tensor
    worse: Tensor
    reference: Tensor  # log-ratio of the reference, better minus worse

    def accuracy(self, params: Params) -> float:
        """Share that is ranked as the true reward does."""
        better, worse = (log_probs_of(params, self.prompts, y) for y in (self.better, self.worse))
        return float((better - worse > self.reference).float().mean())


def held_out(reference: Params, seed: int, draws: int) -> HeldOut:
    """Pairs of samples, up to `draws` for each prompt that no data set of the seed has."""
    order = np.random.default_rng(seed).permutation(all_prompts())
    prompts = torch.tensor(order[int(960 * Sizes.candidates) :]).repeat(draws, 1)
    generator = torch.Generator().manual_seed(70_000 + seed)
    uniform = torch.rand(2, 1, len(prompts), LONGEST, generator=generator)
    one, two = (sample(reference, prompts[None], u)[0] for u in uniform)
    gap = reward(prompts, one) - reward(prompts, two)
    kept = gap.abs() >= GAP
    better = torch.where((gap > 0)[:, None], one, two)[kept][None]
    worse = torch.where((gap > 0)[:, None], two, one)[kept][None]
    prompts = prompts[kept][None]
    ratio = log_probs_of(reference, prompts, better) - log_probs_of(reference, prompts, worse)
    return HeldOut(prompts=prompts, better=better, worse=worse, reference=ratio)


class _Epochs(TrainerCallback):
    """Accuracy after each epoch."""

    def __init__(self, held: HeldOut) -> None:
        self.held, self.found = held, []

    def on_epoch_end(self, args, state, control, model=None, **kwargs) -> None:
        self.found.append(self.held.accuracy(stacked(model)))


def main(args: argparse.Namespace) -> list[str]:
    """Train what is missing, write tables and the picture; the verdict."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)
    seeds = tuple(args.seeds or (SELECTION if args.selection else FRESH))
    arms = ["plain", *(arm for arm in args.arms or ["defaults"] if arm != "plain")]
    cells = CHOSEN_ON if args.selection else CELLS
    if args.only:
        known = {cell.key: cell for cell in cells}
        for key in args.only:
            if key not in known:
                raise SystemExit(f"Invalid --only: {key!r}. One of {list(known)}.")
        cells = [known[key] for key in args.only]
    folder = args.traces or (args.out if args.quick else Path(__file__).parent) / "traces"
    samples, sizes, draws = 20_000, SIGNALS, 3
    if args.quick:
        seeds, cells, samples, sizes, draws = seeds[:1], CELLS[:1], 640, {"strong": 64}, 1
    bench = _Bench(folder, samples, sizes, draws)
    rows = []
    for seed in seeds:
        for cell in cells:
            rows += [bench.row(cell, seed, arm) for arm in arms]
    stem = args.out / f"{'selection_' if args.selection else ''}{result_name()}"
    write_csv(stem.with_suffix(".csv"), rows)
    summary = summary_rows(rows)
    write_csv(stem.with_name(f"summary_{stem.name}.csv"), summary)
    draw(summary, stem.with_suffix(".png"))
    return verdict(rows, summary)


class _Bench:
    """Runs, read back where they exist."""

    def __init__(self, folder: Path, samples: int, sizes: dict[str, int], draws: int) -> None:
        self.folder, self.samples, self.sizes, self.draws = folder, samples, sizes, draws
        self.reference = cache(lambda seed: references([seed], folder / "sft", samples))
        self.held = cache(lambda seed: held_out(self.reference(seed), seed, draws))
        self.task = cache(self._task)

    def _task(self, kind: str, signal: str, seed: int) -> Task:
        few = self.sizes is not SIGNALS
        sizes = Sizes(train=self.sizes[signal], held=20, sampled=0, candidates=1.6 if few else 1.1)
        return build([kind], [seed], self.reference(seed), sizes)

    def row(self, cell: Cell, seed: int, arm: str) -> dict:
        """What came of a run."""
        path = self.folder / f"{cell.key}_{arm.replace(', ', '_').replace(' ', '-')}_{seed}.json"
        if not path.exists():
            began = time.process_time()
            task, held = self.task(cell.kind, cell.signal, seed), self.held(seed)
            data = pairs_of(task.prompts[0], task.chosen[0], task.rejected[0])
            epochs = _Epochs(held)
            trainer = trained(
                arm, self.reference(seed), data, seed=seed, lr=cell.lr, schedule=cell.schedule,
                epochs=cell.epochs, callback=epochs if arm == "plain" else TrainerCallback(),
            )  # fmt: skip
            end = held.accuracy(stacked(trainer.model))
            found = {
                "kind": KINDS[cell.kind],
                "signal": cell.signal,
                "lr": f"{cell.lr:g}",
                "schedule": cell.schedule,
                "epochs": cell.epochs,
                "seed": seed,
                "arm": arm,
                "accuracy": f"{end:.4f}",
                "best_epoch": f"{max(epochs.found):.4f}" if epochs.found else "",
                "steps": trainer.state.global_step,
                "wrong": f"{float(task.noise_rate):.4f}",
                "held": held.prompts.shape[1],
                "cpu_s": f"{time.process_time() - began:.1f}",
            }
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".tmp").write_text(json.dumps(found), encoding="utf-8")
            path.with_suffix(".tmp").replace(path)
            print(f"{cell.key} {seed} {arm}: {end:.4f}, {found['cpu_s']} s", flush=True)
        return json.loads(path.read_text(encoding="utf-8"))


CELL = ("kind", "signal", "lr", "schedule", "epochs")


def summary_rows(rows: Sequence[dict]) -> list[dict]:
    """Mean of each arm in each cell, and its paired difference to plain training."""
    found = []
    at = {(*(r[k] for k in CELL), r["arm"], r["seed"]): r for r in rows}
    for cell in dict.fromkeys(tuple(r[k] for k in CELL) for r in rows):
        own = [r for r in rows if tuple(r[k] for k in CELL) == cell]
        plain = [r for r in own if r["arm"] == "plain"]
        lost = np.mean([float(r["best_epoch"]) - float(r["accuracy"]) for r in plain])
        for arm in dict.fromkeys(r["arm"] for r in own):
            mine = [r for r in own if r["arm"] == arm]
            paired = {
                ("", r["seed"]): float(r["accuracy"])
                - float(at[(*cell, "plain", r["seed"])]["accuracy"])
                for r in mine
            }
            mean, low, high = interval(paired)
            found.append(
                {
                    **dict(zip(CELL, cell, strict=True)),
                    "arm": arm,
                    "seeds": len(mine),
                    "accuracy": f"{np.mean([float(r['accuracy']) for r in mine]):.4f}",
                    "minus_plain": f"{mean:.4f}",
                    "low": f"{low:.4f}",
                    "high": f"{high:.4f}",
                    "steps": f"{np.mean([r['steps'] for r in mine]):.0f}",
                    "plain_overfits_by": f"{lost:.4f}",
                }
            )
    return found


def verdict(rows: Sequence[dict], summary: Sequence[dict]) -> list[str]:
    """The decision rule of the README, applied to each arm."""
    lines = []
    for arm in dict.fromkeys(r["arm"] for r in summary if r["arm"] != "plain"):
        own = [r for r in summary if r["arm"] == arm]
        worst = min(own, key=lambda r: float(r["minus_plain"]))
        below = [r for r in own if float(r["minus_plain"]) < -HARM]
        where = ", ".join(str(worst[k]) for k in CELL)
        lines.append(
            f"{arm}: {len(own) - len(below)} of {len(own)} cells harmless; worst "
            f"{100 * float(worst['minus_plain']):+.1f} in {where}; all {_mean(rows, own, arm)}"
        )
        over = [r for r in own if float(r["plain_overfits_by"]) >= OVERFITS]
        ahead = sum(float(r["minus_plain"]) > 0 for r in over)
        if over:
            lines.append(
                f"  where plain training overfits: {_mean(rows, over, arm)}, ahead in {ahead} of "
                f"{len(over)} cells"
            )
        for kind in KINDS.values():
            decaying = [r for r in own if (r["kind"], r["schedule"]) == (kind, "linear")]
            if decaying:
                lines.append(f"  {kind}, linear decay: {_mean(rows, decaying, arm)}")
        if arm != "defaults" and "defaults" in {r["arm"] for r in rows}:
            lines.append(f"  defaults minus {arm}: {_mean(rows, own, 'defaults', arm)}")
            if over:
                apart = _mean(rows, over, "defaults", arm)
                lines.append(f"  the same where plain training overfits: {apart}")
    return lines


def _mean(rows: Sequence[dict], cells: Sequence[dict], arm: str, base: str = "plain") -> str:
    wanted = {tuple(str(c[k]) for k in CELL) for c in cells}
    at = {(tuple(str(r[k]) for k in CELL), r["arm"], r["seed"]): float(r["accuracy"]) for r in rows}
    seeds = {seed for cell, name, seed in at if name == arm and cell in wanted}
    by_seed = {}  # a seed has the same prompts in all cells, so these are one observation
    for s in seeds:
        own = [at[(c, arm, s)] - at[(c, base, s)] for c in wanted if (c, arm, s) in at]
        by_seed[("", s)] = float(np.mean(own))
    mean, low, high = (100 * x for x in interval(by_seed))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def draw(summary: Sequence[dict], path: Path) -> None:
    """Difference to plain training in each cell."""
    kinds = [k for k in KINDS.values() if any(r["kind"] == k for r in summary)]
    signals = [s for s in SIGNALS if any(r["signal"] == s for r in summary)]
    arms = list(dict.fromkeys(r["arm"] for r in summary if r["arm"] != "plain"))
    figure, axes = plt.subplots(
        len(signals), len(kinds), figsize=(2.7 * len(kinds) + 1, 2.6 * len(signals) + 0.6),
        sharex=True, sharey=True, squeeze=False, layout="constrained", dpi=120,
    )  # fmt: skip
    runs = list(dict.fromkeys((r["lr"], r["schedule"]) for r in summary))
    for line, signal in zip(axes, signals, strict=True):
        for axis, kind in zip(line, kinds, strict=True):
            own = [r for r in summary if (r["kind"], r["signal"]) == (kind, signal)]
            for place, arm in enumerate(arms):
                mine = [r for r in own if r["arm"] == arm]
                x = [runs.index((r["lr"], r["schedule"])) for r in mine]
                mean, low, high = (
                    100 * np.array([float(r[k]) for r in mine])
                    for k in ("minus_plain", "low", "high")
                )
                shift = 0.7 * ((place + 0.5) / len(arms) - 0.5)
                axis.errorbar(
                    np.array(x) + shift, mean, [mean - low, high - mean], fmt="o", ms=4,
                    capsize=2, color=COLOURS[(place + 1) % len(COLOURS)], label=arm,
                )  # fmt: skip
            axis.axhline(0, color="0.4", lw=0.8)
            axis.axhline(-100 * HARM, color="#d55e00", lw=0.8, ls=":")
            axis.set_xticks(range(len(runs)), [f"{lr}\n{schedule}" for lr, schedule in runs])
            axis.set_title(f"{kind}, {signal}", fontsize=10)
            axis.grid(axis="y", color="0.9")
    for axis in axes[:, 0]:
        axis.set_ylabel("accuracy minus plain, points")
    legend(figure, axes.flat[0], loc="lower center", ncols=min(len(arms), 2 * len(kinds)))
    save(figure, path)

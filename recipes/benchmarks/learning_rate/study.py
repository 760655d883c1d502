"""Which rule finds a learning rate without validation data? See README.md for the decision rule.

Traces (one JSON per task and seed) are read back, so a run that was cut goes on.
"""

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.harness.figures import COLOURS, legend, percent, plt, save
from benchmarks.harness.provenance import read_csv, result_name, write_csv
from benchmarks.harness.tables import interval
from benchmarks.learning_rate.runs import GRIDS, OWN_RATE, record
from benchmarks.learning_rate.tasks import SETTINGS

from poprisk_integrations.core.learning_rate_search import parabola_minimum

TAKES = ("seeds", "traces", "arms")
SEEDS = (0, 1)
TWICE = ("diabetes", "table-wrong-labels", "table-wrong-labels-sgd", "lm-tune")  # the others once
RULES = ("finder", "default", "lr_find", "minimum/10", "valley", "one rate", *OWN_RATE)
QUICK = {"AdamW": [1e-3, 4e-3], "PopRiskAdamW": [1e-3, 4e-3], "SGD": [0.03, 0.12]}


def main(args: argparse.Namespace) -> list[str]:
    """Train what is missing, write tables and the picture; the verdict."""
    names = args.arms or (["diabetes"] if args.quick else list(SETTINGS))
    rivals = () if args.quick else tuple(OWN_RATE)
    seeds = args.seeds or ((0,) if args.quick else SEEDS)
    folder = args.traces or (args.out if args.quick else Path(__file__).parent) / "traces"
    grids = QUICK if args.quick else GRIDS
    whole = bool(args.seeds or args.quick)
    jobs = [(name, s) for s in seeds for name in names if whole or s == 0 or name in TWICE]
    with ProcessPoolExecutor(args.jobs) as pool:
        for job in [pool.submit(record, name, seed, folder, grids, rivals) for name, seed in jobs]:
            job.result()
    traces = {
        job: json.loads((folder / f"{job[0]}_{job[1]}.json").read_text(encoding="utf-8"))
        for job in jobs
    }
    stem = args.out / result_name()
    runs = run_rows(traces, grids)
    write_csv(stem.with_suffix(".csv"), runs)
    summary = summary_rows(scores(runs))
    write_csv(stem.with_name(f"summary_{stem.name}.csv"), summary)
    tasks = task_rows(runs)
    write_csv(stem.with_name(f"tasks_{stem.name}.csv"), tasks)
    draw(runs, stem.with_suffix(".png"))
    return [*verdict(summary), *coming_from_adamw(tasks)]


def run_rows(traces: dict[tuple[str, int], dict[str, Any]], grids: dict) -> list[dict]:
    """One row for each training: of the grid, or of a rule."""
    rows = []
    for (name, seed), found in traces.items():
        first = {"task": name, "seed": seed}

        def loss(optimizer: str, lr: float, found: dict[str, Any] = found) -> str:
            return f"{found[f'{optimizer} {lr:.6g}']:.6g}"

        is_sgd = SETTINGS[name].optimizer == "SGD"
        for optimizer in ["SGD"] if is_sgd else ["AdamW", "PopRiskAdamW"]:
            first["optimizer"] = optimizer
            for lr in grids[optimizer]:
                rows.append(
                    {**first, "rule": "grid", "lr": f"{lr:.6g}", "loss": loss(optimizer, lr)}
                )
            for rule, told in found[f"{optimizer} suggestions"].items():
                row = {**first, "rule": rule, "lr": f"{told['lr']:.6g}"}
                rows.append({**row, "loss": loss(optimizer, told["lr"]), **_details(told)})
        if not is_sgd:
            for optimizer, lr in OWN_RATE.items():
                if f"{optimizer} {lr:.6g}" not in found:  # the quick form does without
                    continue
                row = {**first, "optimizer": optimizer, "rule": optimizer, "lr": f"{lr:g}"}
                rows.append({**row, "loss": loss(optimizer, lr)})
            lr = found["AdamW suggestions"]["finder"]["lr"]
            row = {**first, "optimizer": "PopRiskAdamW", "rule": "AdamW's rate", "lr": f"{lr:.6g}"}
            rows.append({**row, "loss": loss("PopRiskAdamW", lr)})
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return [{key: row.get(key, "") for key in keys} for row in rows]


def _details(told: dict[str, Any]) -> dict[str, Any]:
    found = {"steps": told["steps"]}
    if "low" in told:
        found |= {key: f"{told[key]:.6g}" for key in ("low", "high")}
        found |= {key: told[key] for key in ("length", "tried")}
    return found


def tuned_rates(runs: list[dict]) -> dict[tuple[str, str], tuple[float, float]]:
    """By task and optimizer: best rate of the grid by the mean over seeds, and between its points.

    The second is where a parabola through three means has its minimum.
    """
    found = {}
    grid = [row for row in runs if row["rule"] == "grid"]
    for key in dict.fromkeys((row["task"], row["optimizer"]) for row in grid):
        means: dict[float, list[float]] = {}
        for row in grid:
            if (row["task"], row["optimizer"]) == key:
                means.setdefault(float(row["lr"]), []).append(float(row["loss"]))
        losses = {lr: float(np.mean(values)) for lr, values in means.items()}
        best = min(losses, key=losses.__getitem__)
        found[key] = best, parabola_minimum(losses, max(losses.values()))
    return found


def scores(runs: list[dict]) -> list[dict]:
    """Each rule's excess of held-out loss over the tuned rate, by task and seed."""
    tuned = tuned_rates(runs)
    loss_at = {
        (row["task"], row["optimizer"], row["seed"], float(row["lr"])): float(row["loss"])
        for row in runs
        if row["rule"] == "grid"
    }
    rows = []
    for row in [row for row in runs if row["rule"] != "grid"]:
        kind = "AdamW" if row["optimizer"] in OWN_RATE else row["optimizer"]
        best, between = tuned[row["task"], kind]
        least = loss_at[row["task"], kind, row["seed"], best]
        lr = float(row["lr"])
        rows.append(
            {
                **{key: row[key] for key in ("task", "seed", "optimizer", "rule")},
                "excess": float(row["loss"]) / least - 1,
                "ratio": "" if row["optimizer"] in OWN_RATE else lr / between,
                "covers": float(row["low"]) <= between <= float(row["high"])
                if row.get("low")
                else "",
                "cost": float(row["steps"]) / float(row["length"]) if row.get("length") else "",
            }
        )
    return rows + _one_rate(runs, tuned, loss_at)


def task_rows(runs: list[dict]) -> list[dict]:
    """By task and optimizer: the tuned rate, and how far each rule is from it."""
    found = []
    rows = scores(runs)
    tuned = {key: between for key, (_, between) in tuned_rates(runs).items()}
    for (task, optimizer), rate in tuned.items():
        own = [row for row in rows if (row["task"], row["optimizer"]) == (task, optimizer)]
        gate = tuned.get((task, "PopRiskAdamW")) if optimizer == "AdamW" else None
        line = {"task": task, "optimizer": optimizer, "tuned": f"{rate:.3g}"}
        line["gate_over_adamw"] = f"{gate / rate:.3f}" if gate else ""
        for rule in ("finder", "default", "lr_find", "minimum/10", "valley"):
            those = [row for row in own if row["rule"] == rule]
            line[rule] = f"{np.mean([r['excess'] for r in those]):.4f}" if those else ""
            line[f"{rule} ratio"] = f"{np.median([r['ratio'] for r in those]):.3g}" if those else ""
        found.append(line)
    return found


def coming_from_adamw(tasks: list[dict]) -> list[str]:
    """Rule 3: what to multiply AdamW's rate with."""
    ratios = [float(row["gate_over_adamw"]) for row in tasks if row["gate_over_adamw"]]
    if not ratios:
        return []
    span = f"median {np.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}"
    return [f"gate's tuned rate over AdamW's: {span} ({len(ratios)} tasks)"]


def _one_rate(runs: list[dict], tuned: dict, loss_at: dict) -> list[dict]:
    """The rate of the grid that is best for all tasks of AdamW together, seen in hindsight."""
    tasks = [task for task, optimizer in tuned if optimizer == "AdamW"]
    runs_of = list(dict.fromkeys((r["task"], r["seed"]) for r in runs if r["optimizer"] == "AdamW"))
    rates = sorted({lr for _, optimizer, _, lr in loss_at if optimizer == "AdamW"})

    def excess(task: str, seed: Any, lr: float) -> float:
        least = loss_at[task, "AdamW", seed, tuned[task, "AdamW"][0]]
        return loss_at[task, "AdamW", seed, lr] / least - 1

    if not tasks:
        return []

    def mean_excess(lr: float) -> float:  # each task counts once
        return sum(np.mean([excess(t, s, lr) for t, s in runs_of if t == own]) for own in tasks)

    best = min(rates, key=mean_excess)
    return [
        {
            **{"task": task, "seed": seed, "optimizer": "AdamW", "rule": "one rate"},
            "excess": excess(task, seed, best),
            "ratio": best / tuned[task, "AdamW"][1],
            "covers": "",
            "cost": "",
        }
        for task, seed in runs_of
    ]


def summary_rows(rows: list[dict]) -> list[dict]:
    """For AdamW and SGD together (the gate apart): each rule over tasks."""
    found = []
    keys = dict.fromkeys((row["optimizer"] == "PopRiskAdamW", row["rule"]) for row in rows)
    for is_gate, rule in keys:
        own = [
            row
            for row in rows
            if row["rule"] == rule and (row["optimizer"] == "PopRiskAdamW") == is_gate
        ]
        tasks = list(dict.fromkeys(row["task"] for row in own))
        means = {t: float(np.mean([r["excess"] for r in own if r["task"] == t])) for t in tasks}
        mean, low, high = interval({(r["task"], r["seed"]): r["excess"] for r in own})
        ratios = np.array([row["ratio"] for row in own if row["ratio"] != ""])
        covers = [row["covers"] for row in own if row["covers"] != ""]
        costs = [row["cost"] for row in own if row["cost"] != ""]
        worst = max(means, key=means.__getitem__)
        default = {
            r["task"]: r["excess"] for r in _means(rows) if r["rule"] == "default" and not is_gate
        }
        better = [means[t] < default[t] for t in tasks if t in default]
        found.append(
            {
                "optimizer": "PopRiskAdamW" if is_gate else "AdamW, SGD",
                "rule": rule,
                "tasks": len(tasks),
                "excess": f"{mean:.4f}",
                "excess_low": f"{low:.4f}",
                "excess_high": f"{high:.4f}",
                "median_task": f"{np.median([*means.values()]):.4f}",
                "without_pinn": _mean_without(means, "pinn"),
                "worst": f"{means[worst]:.4f}",
                "worst_task": worst,
                "within_2": f"{_within(ratios, 2):.3f}" if len(ratios) else "",
                "within_4": f"{_within(ratios, 4):.3f}" if len(ratios) else "",
                "median_ratio": f"{np.median(ratios):.3f}" if len(ratios) else "",
                "range_covers": f"{np.mean(covers):.3f}" if covers else "",
                "cost_in_probes": f"{np.mean(costs):.2f}" if costs else "",
                "better_than_default": f"{np.mean(better):.3f}" if better else "",
            }
        )
    return found


def _means(rows: list[dict]) -> list[dict]:
    keys = dict.fromkeys((row["task"], row["rule"], row["optimizer"]) for row in rows)
    return [
        {
            "task": task,
            "rule": rule,
            "excess": float(
                np.mean(
                    [
                        r["excess"]
                        for r in rows
                        if (r["task"], r["rule"], r["optimizer"]) == (task, rule, optimizer)
                    ]
                )
            ),
        }
        for task, rule, optimizer in keys
        if optimizer != "PopRiskAdamW"
    ]


def _mean_without(means: dict[str, float], task: str) -> str:
    rest = [value for name, value in means.items() if name != task]
    return f"{np.mean(rest):.4f}" if rest else ""


def _within(ratios: np.ndarray, factor: float) -> float:
    return float(np.mean(np.abs(np.log(ratios)) <= np.log(factor)))


def verdict(summary: list[dict]) -> list[str]:
    """Table of the README, and which targets were met."""
    lines = [
        "| optimizer | rule | excess | worst task | within x2 | within x4 | better than default |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in summary:
        mean, low, high = percent(row, "excess", ("excess_low", "excess_high"))
        cells = (
            row["optimizer"],
            row["rule"],
            f"{mean:+.1f} % [{low:+.1f}, {high:+.1f}]",
            f"{100 * float(row['worst']):+.0f} % {row['worst_task']}",
            *(row[key] for key in ("within_2", "within_4", "better_than_default")),
        )
        lines.append("| " + " | ".join(cells) + " |")
    ours = next(r for r in summary if r["rule"] == "finder" and r["optimizer"] != "PopRiskAdamW")
    met = {
        "mean excess at most 10 %": float(ours["excess"]) <= 0.10,
        "worst task at most 30 %": float(ours["worst"]) <= 0.30,
        "within a factor of 4 in 90 % of searches": float(ours["within_4"]) >= 0.9,
        "better than the default on two thirds of the tasks": float(ours["better_than_default"])
        >= 2 / 3,
        "at most 5 trainings' length": float(ours["cost_in_probes"]) <= 5,
    }
    return [*lines, "", *(f"{'met' if ok else 'MISSED'}: {what}" for what, ok in met.items())]


def draw(runs: list[dict], path: Path) -> None:
    """Held-out loss over the rate for each task, and what the rules suggest."""
    tasks = list(dict.fromkeys(row["task"] for row in runs))
    across = min(4, len(tasks))
    down = -(-len(tasks) // across)
    fig, axes = plt.subplots(
        down, across, figsize=(3.4 * across, 2.6 * down), squeeze=False, dpi=110
    )
    for axis, task in zip(axes.flat, tasks, strict=False):
        own = [r for r in runs if r["task"] == task and r["optimizer"] in ("AdamW", "SGD")]
        grid = [row for row in own if row["rule"] == "grid"]
        lrs = sorted({float(row["lr"]) for row in grid})
        means = [np.mean([float(r["loss"]) for r in grid if float(r["lr"]) == lr]) for lr in lrs]
        axis.plot(lrs, means, "-", color=COLOURS[0], label="held-out loss at the end")
        shown = ("finder", "lr_find", "minimum/10", "valley", "default")
        for place, rule in enumerate(shown, 1):
            at = [(float(r["lr"]), float(r["loss"])) for r in own if r["rule"] == rule]
            mark = "o" if rule == "finder" else "x"
            axis.plot(*zip(*at, strict=True), mark, ms=5, color=COLOURS[place], label=rule)
        axis.set(xscale="log", title=task)
        axis.grid(color="0.9")
    for axis in axes.flat[len(tasks) :]:
        axis.set_axis_off()
    legend(fig, axes[0][0], "lower center", ncols=6)
    save(fig, path)


def recompute(path: Path) -> list[dict]:
    """The summary of a committed table of runs."""
    return summary_rows(scores(read_csv(path)))

"""Regret of the stop, its rivals and hold-out on eight tasks; see README.md for the rules.

Usage: python recipes/benchmarks/early_stopping/bench.py [--out DIR] [--traces DIR] [--quick]
Resumable: a trace that exists is read back.
"""

import argparse
import sys
from pathlib import Path

import torch
from figures import draw_regret, draw_trajectories
from grid import cells, load, seeds_of, trace
from scores import PRIMARY, bootstrap, per_seed, rows_of

sys.path.insert(0, str(Path(__file__).parents[1]))
from reporting import hardware, write_csv

HERE = Path(__file__).parent
TASKS = ("T2", "T3", "T1-300", "T4", "T8", "T5", "T1-800", "T6")
JUDGED = ("T1", "T2", "T3", "T4", "T5")
SHOWN = (("T1-800", "n=800 20% sym"), ("T1-800", "n=800 0% sym"), ("T2", "20% sym"), ("T5", ""))


def main() -> None:
    """Train what is missing, apply all rules, write tables and plots, print the verdict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--traces", type=Path, default=HERE / "traces")
    parser.add_argument("--quick", action="store_true", help="two cells, few epochs, for tests")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = args.out / "traces" if args.quick else args.traces
    wanted = list(cells(("T2", "T4") if args.quick else TASKS))
    wanted = [wanted[1], wanted[-1]] if args.quick else wanted
    rows: list[dict] = []
    shown = {}
    for cell in wanted:
        seeds = range(2) if args.quick else seeds_of(cell.task)
        path = trace(cell, seeds, folder, epochs=12 if args.quick else None)
        rows += rows_of(cell, path)
        usual = (cell.optimizer, cell.lr, cell.schedule) == ("AdamW", 1e-3, "constant")
        if usual and cell.batch in (16, 32) and any(cell.task == task for task, _ in SHOWN):
            shown.setdefault(cell.task, load(path))
    columns = list(dict.fromkeys(name for row in rows for name in row))
    rows = [{name: row.get(name, "") for name in columns} for row in rows]
    path = args.out / f"{hardware()}.csv"
    write_csv(path, rows)
    summary = summarise(rows)
    if not args.quick:
        write_csv(args.out / f"summary_{hardware()}.csv", summary)
        write_csv(args.out / f"groups_{hardware()}.csv", groups(rows))
    draw_regret(summary, path.with_suffix(".png"))
    if shown:
        draw_trajectories(shown, SHOWN, args.out / f"trajectories_{hardware()}.png")
    for line in verdict(rows, summary):
        print(line)


def rules_of(rows: list[dict]) -> list[str]:
    """Names of all rules, in the order of the table's columns."""
    return [name.removeprefix("regret: ") for name in rows[0] if name.startswith("regret: ")]


def summarise(rows: list[dict]) -> list[dict]:
    """Per rule: mean regret by task, and the paired difference to the primary hold-out."""
    held = per_seed(rows, PRIMARY)
    table = []
    for rule in rules_of(rows):
        mine = per_seed(rows, rule)
        row: dict = {"rule": rule}
        for task in ("T1", "T2", "T3", "T4", "T5", "T6", "T7", "T8"):
            values = [v for (t, _), v in mine.items() if t == task]
            row[task] = round(sum(values) / len(values), 5) if values else ""
        common = {k: v - held[k] for k, v in mine.items() if k in held and k[0] in JUDGED}
        complete = {t for t, _ in common} == {t for t, _ in held if t in JUDGED}
        found = bootstrap(common) if common and complete else ("", "", "")
        for name, value in zip(("minus hold-out", "low", "high"), found, strict=True):
            row[name] = round(value, 5) if value != "" else ""
        clean = [v for (t, _), v in per_seed(rows, rule, "lost").items() if t == "T7"]
        row["T7 accuracy lost"] = round(sum(clean) / len(clean), 5) if clean else ""
        table.append(row)
    return table


def groups(rows: list[dict]) -> list[dict]:
    """The primary comparison within optimizers, rates, schedules, batches: after the verdict."""
    table = []
    for column in ("optimizer", "lr", "schedule", "batch"):
        for value in dict.fromkeys(row[column] for row in rows):
            part = [row for row in rows if row[column] == value]
            mine, held = per_seed(part, "poprisk"), per_seed(part, PRIMARY)
            paired = {k: v - held[k] for k, v in mine.items() if k in held and k[0] in JUDGED}
            mean, low, high = bootstrap(paired)
            found = {"group": f"{column} {value}", "minus hold-out": round(mean, 5)}
            table.append(found | {"low": round(low, 5), "high": round(high, 5)})
    return table


def verdict(rows: list[dict], summary: list[dict]) -> list[str]:
    """The decision rule of the README."""
    ours = next(row for row in summary if row["rule"] == "poprisk")
    held = next(row for row in summary if row["rule"] == PRIMARY)
    tasks = [task for task in JUDGED if ours[task] != "" and held[task] != ""]
    low, high = ours["low"], ours["high"]
    word = "better" if high < 0 else "worse" if low > 0 else "level"
    gaps = {task: ours[task] - held[task] for task in tasks}
    worst = max(gaps, key=lambda task: gaps[task])
    means = [sum(row[task] for task in tasks) / len(tasks) for row in (ours, held)]
    lines = [
        f"mean regret over {', '.join(tasks)}: poprisk {means[0]:.4f}, {PRIMARY} {means[1]:.4f}; "
        f"difference {ours['minus hold-out']:+.4f} [{low:+.4f}, {high:+.4f}]: {word}",
        f"worst task: {worst}, {gaps[worst]:+.4f} (fine up to +0.02)",
    ]
    if ours["T7 accuracy lost"] != "":
        lines.append(
            f"clean data (T7): accuracy lost {100 * ours['T7 accuracy lost']:.2f} points "
            f"(hold-out {100 * held['T7 accuracy lost']:.2f}; fine up to 0.5)"
        )
    stops = [row["stopped"] for row in rows if row["task"] == "T8"]
    if stops:
        lines.append(f"streams (T8): {sum(int(s) for s in stops)} of {len(stops)} runs stopped")
    return lines


if __name__ == "__main__":
    main()

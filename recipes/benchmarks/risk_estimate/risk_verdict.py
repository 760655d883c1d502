"""From rows to means over seeds, sign changes, and the lines of the decision rule."""

from collections.abc import Iterator

import numpy as np
from gate_harness.scores import interval
from risk_statistics import best_step, sign_change

__all__ = ["cell_window", "sign_rows", "summary_rows", "verdict"]

KEYS = ("task", "data", "optimizer", "lr", "phase", "horizon", "estimator")
MEANS = (
    "detrended",
    "bias",
    "slope",
    "error",
    "correlation_first_order",
    "bias_first_order",
    "covered",
    "covered_first_order",
    "covered_series",
    "ceiling",
)
JUDGED = ("lagged", "leave-one-out")
CHANGES = ("exact", "lagged", "moments", "streaming", "naive", "training set", "first order")


def summary_rows(rows: list[dict]) -> list[dict]:
    """One row for each group of seeds: means, the correlation with its interval, z over seeds."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in KEYS), []).append(row)
    table = []
    for key, group in groups.items():
        r = {("", i): float(row["correlation"]) for i, row in enumerate(group)}
        mean, low, high = interval({k: v for k, v in r.items() if np.isfinite(v)} or {("", 0): 0.0})
        off = {("", i): float(row["bias_first_order"]) for i, row in enumerate(group)}
        off = {k: v for k, v in off.items() if np.isfinite(v)}
        around = interval(off) if off else ("", "", "")
        z = [float(row["z"]) for row in group if row["z"] != ""]
        table.append(
            {
                **dict(zip(KEYS, key, strict=True)),
                "seeds": len(group),
                "windows": f"{np.mean([row['windows'] for row in group]):.0f}",
                "correlation": f"{mean:.3f}",
                "low": f"{low:.3f}",
                "high": f"{high:.3f}",
                **{name: _mean(group, name) for name in MEANS},
                "bias_first_order_low": _text(around[1]),
                "bias_first_order_high": _text(around[2]),
                "z": f"{sum(z) / len(z) ** 0.5:.2f}" if z else "",
            }
        )
    return table


def _text(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.3g}"


def _mean(group: list[dict], name: str) -> str:
    values = [float(row[name]) for row in group if row[name] != ""]
    return f"{np.nanmean(values):.3g}" if values and np.isfinite(values).any() else ""


def sign_rows(found: dict) -> list[dict]:
    """Per reused run: best epoch, epoch of each estimate's sign change, and best / sign change."""
    table = []
    for (task, stream, optimizer, lr), traces in found.items():
        if stream:
            continue
        for seed, run in traces.items():
            best = best_step(run) / int(run["epoch_steps"])
            cell = {"task": task, "optimizer": optimizer, "lr": f"{lr:g}", "seed": seed}
            changes = {name: sign_change(run, name) for name in CHANGES}
            epochs = len(run["exact"]) // int(run["epoch_steps"])
            inside = int(best < epochs)
            values = {name: f"{value:g}" for name, value in changes.items()}
            ratio = {"best / lagged": f"{best / changes['lagged']:.3f}"}
            table.append({**cell, "best": f"{best:g}", "inside": inside, **values, **ratio})
    return table


def cell_window(task: str) -> int:
    """Horizon that is judged; the run of D is short."""
    return 10 if task == "D" else 25


def pick(summary: list[dict], estimator: str, phase: str, data: str = "stream") -> Iterator[dict]:
    """Rows of the judged horizon: one for each cell."""
    for row in summary:
        if (row["estimator"], row["phase"], row["data"]) == (estimator, phase, data):
            wanted = cell_window(row["task"]) if data == "stream" else 1
            if int(row["horizon"]) == wanted:
                yield row


def verdict(summary: list[dict], signs: list[dict], halves: list[dict]) -> list[str]:
    """The decision rule of the README, line by line."""
    lines = []
    for name in JUDGED:
        cells = [float(row["correlation"]) for row in pick(summary, name, "first epoch")]
        met = sum(r >= 0.8 for r in cells)
        lines.append(
            f"1 first epoch, {name}: r >= 0.8 in {met} of {len(cells)} cells "
            f"(smallest {min(cells):.3f}): {'right' if met == len(cells) else 'missed'}"
        )
    for name in JUDGED:
        cells = list(pick(summary, name, "second half"))
        trivial = {_cell(row): row for row in pick(summary, "persistence", "second half")}
        r = np.array([float(row["correlation"]) for row in cells])
        above = sum(
            float(row["low"]) > max(0.0, float(trivial[_cell(row)]["high"])) for row in cells
        )
        mean = r.mean()
        partly = mean >= 0.5 or above == len(cells)
        word = "holds" if mean >= 0.8 else "partly" if partly else "fails"
        lines.append(
            f"2 second half, {name}: mean r {mean:.3f}, from {r.min():.3f} to {r.max():.3f}; above "
            f"0 and persistence in {above} of {len(cells)} cells: {word}"
        )
    for name in JUDGED:
        cells = list(pick(summary, name, "first epoch"))
        runs = np.array([row["seeds"] for row in cells])
        z = (np.array([float(row["z"]) for row in cells]) * runs**0.5).sum() / runs.sum() ** 0.5
        lines.append(f"3 {name}: z = {z:+.2f}: {'unbiased' if abs(z) <= 2.6 else 'BIASED'}")
        zero = sum(
            float(r["bias_first_order_low"]) <= 0 <= float(r["bias_first_order_high"])
            for r in cells
        )
        mean = float(np.mean([float(r["bias_first_order"]) for r in cells]))
        lines.append(
            f"3 {name}: bias {mean:+.3f} on average; its interval over seeds holds 0 in {zero} of "
            f"{len(cells)} cells"
        )
    for phase in ("first epoch", "second half"):
        cells = list(pick(summary, "first order", phase))
        r = min(float(row["correlation"]) for row in cells)
        bias = max((float(row["bias"]) for row in cells), key=abs)
        lines.append(f"4 first order, {phase}: smallest r {r:.3f}, largest bias {bias:+.3f}")
    for name in JUDGED:
        held = [float(r["covered_first_order"]) for r in pick(summary, name, "first epoch")]
        mean = float(np.mean(held))
        word = "calibrated" if 0.9 <= mean <= 0.99 else "not calibrated"
        lines.append(f"5 {name}: {100 * mean:.1f} % of the intervals hold: {word}")
    before = {_cell(r): float(r["bias"]) for r in pick(summary, "lagged", *_REUSED[0])}
    after = {_cell(r): float(r["bias"]) for r in pick(summary, "lagged", *_REUSED[1])}
    both = [cell for cell in after if cell in before]
    grows = sum(abs(after[cell]) > abs(before[cell]) for cell in both)
    lines.append(f"6 reused: the size of the bias of lagged grows in {grows} of {len(both)} cells")
    ratio = float(np.mean([float(row["ratio"]) for row in halves]))
    word = "holds" if 0.45 <= ratio <= 0.55 else "missed"
    lines.append(f"6 quadratic model: sign change at {ratio:.3f} of the best time: {word}")
    inside = [row for row in signs if row["inside"]]
    for task in dict.fromkeys(row["task"] for row in inside):
        values = [float(row["best / lagged"]) for row in inside if row["task"] == task]
        lines.append(
            f"6 {task}: best epoch / sign change of lagged, median {np.median(values):.2f}"
        )
    return lines


_REUSED = (("until the best", "reused"), ("after the best", "reused"))


def _cell(row: dict) -> tuple:
    return row["task"], row["optimizer"], row["lr"]

"""From traces to tables: what each arm keeps, differences between arms, errors of the curves."""

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
from benchmarks.harness.tables import Found, Paired, interval
from benchmarks.ordinary_use.conditions import CONDITIONS
from benchmarks.ordinary_use.estimators import ESTIMATORS, held_out_curve, shipped_accuracy, truth
from benchmarks.ordinary_use.rules import (
    CANDIDATES,
    METRICS,
    Kept,
    basic_rules,
    live_rules,
    values_of,
)
from benchmarks.ordinary_use.runs import Runs

__all__ = [
    "CANDIDATE",
    "END",
    "HELD",
    "RIVALS",
    "curve_rows",
    "difference",
    "mean_of",
    "means",
    "rows_of",
    "summary",
]

END, HELD = "train to the end", "hold-out 10 %"
RIVALS = (HELD, END)
CANDIDATE = "sit out: "
CAP = 1.0  # nats, of a difference between losses
NO_ACCURACY = ("language", "diabetes")  # makers of data without an accuracy that anyone looks at
Z90 = 1.645
Row = dict[str, object]
Table = dict[str, dict[tuple[str, int], Row]]  # by arm, then by condition and seed


def rows_of(runs: Runs) -> list[Row]:
    """One row for each arm of a condition and seed; none if its runs are not all there."""
    name, seed = runs.condition.name, runs.seed
    if any(runs.get(arm) is None for arm in ("full", "sit", "hold10")):
        return []
    kept = [*basic_rules(runs), *live_rules(runs)]
    kept += [(CANDIDATE + rule, choose(runs)) for rule, choose in CANDIDATES.items()]
    has_accuracy = runs.condition.data.__name__ not in NO_ACCURACY
    rows = []
    for arm, what in kept:
        found = values_of(runs, what)
        epoch = found_epoch(runs, what)
        rows.append(
            {
                "condition": name,
                "half": runs.condition.half,
                "seed": seed,
                "arm": arm,
                "epoch": round(epoch, 3),
                "weights": what.of or "last",
                "trained_epochs": round(what.epochs, 2),
                **{
                    metric: round(found[metric], 5)
                    if has_accuracy or not metric.endswith("accuracy")
                    else ""
                    for metric in METRICS
                },
            }
        )
    return rows


def found_epoch(runs: Runs, kept: Kept) -> float:
    """Epochs of training behind what is kept, without its cooldown."""
    trace = runs[kept.arm]
    if kept.of.startswith("live"):
        rows = trace["live_row"].tolist()
        return float(trace["live_from"][0 if kept.of == "live_short" else rows.index(kept.row)])
    if kept.of in ("cool", "long"):
        return float(trace[f"{kept.of}_from"][int(kept.row)])
    return float(np.interp(kept.row, np.arange(len(trace["at"])), trace["at"]))


def curve_rows(runs: Runs) -> list[Row]:
    """Errors of the estimates and of a 10 % hold-out, from the second epoch to twice the best."""
    name, seed = runs.condition.name, runs.seed
    if runs.get("sit") is None or runs.get("hold10") is None:
        return []
    sit = runs["sit"]
    until = max(2.0, 2 * float(sit["at"][sit["noisy_loss"].argmin()]))
    at, held, noisy = held_out_curve(runs)
    use = (at > 1) & (at <= until)
    held_error = float(np.abs(held - noisy)[use].mean())
    rows = []
    for estimator, estimate in ESTIMATORS.items():
        curve = runs.once(estimate)
        use = (curve.middle > 1) & (curve.middle <= until) & np.isfinite(curve.value)
        error = curve.value[use] - truth(sit, curve.middle[use])
        error_as_trained = curve.value[use] - truth(sit, curve.middle[use], "noisy_loss_as_trained")
        own = truth(sit, curve.middle[use], "noisy_loss_se")
        spread = np.hypot(curve.se[use], own)  # the test set is a sample as well
        rows.append(
            {
                "condition": name,
                "half": runs.condition.half,
                "seed": seed,
                "estimator": estimator,
                "windows": int(use.sum()),
                "error": round(float(np.abs(error).mean()), 5),
                "error_as_trained": round(float(np.abs(error_as_trained).mean()), 5),
                "bias": round(float(error.mean()), 5),
                "covered": round(float((np.abs(error) <= Z90 * spread).mean()), 4),
                "se": round(float(curve.se[use].mean()), 5),
                "held_out_error": round(held_error, 5),
                **_accuracy_errors(runs, until),
            }
        )
    return rows


def _accuracy_errors(runs: Runs, until: float) -> Row:
    """Mean absolute errors of the estimated and of the held-out accuracy, where there is one."""
    curve = shipped_accuracy(runs)
    if curve is None or runs.condition.data.__name__ in NO_ACCURACY:
        return {"accuracy_error": "", "held_out_accuracy_error": ""}
    use = (curve.middle > 1) & (curve.middle <= until) & np.isfinite(curve.value)
    true = truth(runs["sit"], curve.middle[use], "noisy_accuracy")
    at, held, noisy = held_out_curve(runs, "accuracy")
    there = (at > 1) & (at <= until)
    return {
        "accuracy_error": round(float(np.abs(curve.value[use] - true).mean()), 5),
        "held_out_accuracy_error": round(float(np.abs(held - noisy)[there].mean()), 5),
    }


def table_of(rows: Iterable[Row]) -> Table:
    """Rows by arm, then by condition and seed."""
    found: Table = defaultdict(dict)
    for row in rows:
        found[str(row["arm"])][str(row["condition"]), int(row["seed"])] = row
    return found


def difference(table: Table, arm: str, other: str, metric: str) -> Paired:
    """An arm minus another, paired; where one has no value there is none."""
    found = {}
    for key, row in table[arm].items():
        against = table[other].get(key)
        if against is None or row[metric] == "" or against[metric] == "":
            continue
        value = float(row[metric]) - float(against[metric])
        if metric.endswith("loss"):
            value = float(np.clip(np.nan_to_num(value, nan=CAP), -CAP, CAP))
        found[key] = value
    return found


def mean_of(differences: Paired) -> Found:
    """Mean over conditions and its interval; in one order, so that the draws are the same."""
    return interval(dict(sorted(differences.items())))


def means(differences: Paired) -> dict[str, float]:
    """Mean over seeds, condition by condition."""
    groups: dict[str, list[float]] = defaultdict(list)
    for (condition, _), value in differences.items():
        groups[condition].append(value)
    return {condition: float(np.mean(values)) for condition, values in groups.items()}


def summary(rows: list[Row]) -> list[Row]:
    """One row for each arm: differences to the rivals with intervals, and the worst condition."""
    table = table_of(rows)
    lines = []
    for arm in table:
        line: Row = {"arm": arm}
        for other in RIVALS:
            short = "hold-out" if other == HELD else "end"
            for metric in ("clean_accuracy", "clean_loss", "noisy_loss"):
                found = difference(table, arm, other, metric)
                if not found:
                    continue
                mean, low, high = mean_of(found)
                by_condition = means(found)
                worst = min if metric == "clean_accuracy" else max
                where = worst(by_condition, key=by_condition.__getitem__)
                line |= {
                    f"{metric} minus {short}": round(mean, 5),
                    f"{metric} minus {short}, low": round(low, 5),
                    f"{metric} minus {short}, high": round(high, 5),
                    f"{metric} minus {short}, worst": round(by_condition[where], 5),
                    f"{metric} minus {short}, worst in": where,
                }
        trained = [
            float(row["trained_epochs"]) / CONDITIONS[str(row["condition"])].epochs
            for row in table[arm].values()
        ]
        line["trained"] = round(float(np.mean(trained)), 3)
        lines.append(line)
    return lines

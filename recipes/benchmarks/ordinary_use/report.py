"""What is made of the scores: tables in Markdown, the decision rule applied, two pictures."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
from benchmarks.harness.figures import plt, save
from benchmarks.harness.tables import word
from benchmarks.ordinary_use.conditions import CONDITIONS, Condition
from benchmarks.ordinary_use.estimators import Curve
from benchmarks.ordinary_use.rules import DEFAULT
from benchmarks.ordinary_use.runs import Runs
from benchmarks.ordinary_use.scores import END, HELD, difference, mean_of, means, table_of

__all__ = [
    "arms_table",
    "conditions_table",
    "curve_verdict",
    "curves_table",
    "draw_curves",
    "draw_differences",
    "verdict",
]

ORACLE = "oracle of clean accuracy"
TRUE, ESTIMATE, TRAIN, HELD_OUT = "#222222", "#c0504d", "#7f7f7f", "#4f81bd"
MODELS = {
    "digits": "digits",
    "table": "table",
    "diabetes": "diabetes (regression)",
    "mixture": "Gaussian mixture",
    "sparse_text": "words of snippets",
    "text_classes": "tokens of snippets",
    "language": "language model",
    "preferences": "DPO",
}


def conditions_table() -> str:
    """All conditions."""
    lines = [
        "| condition | data, model | examples | wrong labels | optimizer, rate | schedule | "
        " epochs | batch | half |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for c in CONDITIONS.values():
        wrong = f"{c.share:.0%} {c.kind}" if c.share else c.kind if c.kind == "weak" else "none"
        lines.append(
            f"| {c.name} | {_data(c)} | {c.n:,} | {wrong} | {c.optimizer} {c.lr:g} | {c.schedule} |"
            f" {c.epochs} | {c.batch} | {c.half} |"
        )
    return "\n".join(lines)


def _data(c: Condition) -> str:
    said = [MODELS[c.data.__name__]]
    for key, value in c.options.items():
        if key == "shift":
            said.append("shifted by up to a pixel")
        elif key in ("dropout", "rank"):
            said.append(f"{'LoRA rank' if key == 'rank' else key} {value}")
        elif key != "test":
            said.append(str(value).replace("_", " "))
    if c.data.__name__ in ("digits",) and "model" not in c.options:
        said.append("mlp")
    return ", ".join(said)


def arms_table(lines: list[dict]) -> str:
    """Differences to the rivals: points of clean accuracy, nats of clean and noisy loss."""
    found = [
        "| arm | accuracy minus hold-out 10 % | worst | accuracy minus the end | worst | clean loss"
        " minus hold-out 10 % | noisy loss minus hold-out 10 % | passes trained |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        cells = [str(line["arm"])]
        for short in ("hold-out", "end"):
            cells.append(_interval(line, f"clean_accuracy minus {short}", 100, 1))
            cells.append(_worst(line, f"clean_accuracy minus {short}"))
        for metric in ("clean_loss", "noisy_loss"):
            cells.append(_interval(line, f"{metric} minus hold-out", 1, 3))
        cells.append(f"{float(line['trained']):.2f}")
        found.append("| " + " | ".join(cells) + " |")
    return "\n".join(found)


def curves_table(rows: list[dict]) -> str:
    """Mean error of each estimate by condition, beside a 10 % hold-out's."""
    estimators = list(dict.fromkeys(str(row["estimator"]) for row in rows))
    names = [n for n in CONDITIONS if any(row["condition"] == n for row in rows)]
    found = [
        "| condition | 10 % hold-out | "
        + " | ".join(estimators)
        + " | covered | accuracy: 10 % hold-out | shipped |",
        "|---|---|" + "---|" * (len(estimators) + 3),
    ]
    for name in names:
        here = [row for row in rows if row["condition"] == name]

        def mean(estimator: str, column: str, here: list[dict] = here) -> float:
            values = [float(r[column]) for r in here if r["estimator"] == estimator]
            return sum(values) / len(values)

        cells = [f"{mean(estimators[0], 'held_out_error'):.3f}"]
        cells += [f"{mean(e, 'error'):.3f}" for e in estimators]
        cells.append(f"{mean(estimators[0], 'covered'):.0%}")
        if here[0]["accuracy_error"] == "":
            cells += ["", ""]
        else:
            for column in ("held_out_accuracy_error", "accuracy_error"):
                cells.append(f"{100 * mean(estimators[0], column):.1f}")
        found.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(found)


def _interval(line: dict, name: str, scale: float, digits: int) -> str:
    if line.get(name, "") == "":
        return ""
    mean, low, high = (scale * float(line[name + end]) for end in ("", ", low", ", high"))
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def _worst(line: dict, name: str) -> str:
    if line.get(name, "") == "":
        return ""
    return f"{100 * float(line[f'{name}, worst']):+.1f} {line[f'{name}, worst in']}"


def verdict(rows: list[dict], arm: str = DEFAULT) -> list[str]:
    """Points 2 to 5 for one arm."""
    table = table_of(rows)
    lines = [f"**{arm}**"]
    mean, low, high = mean_of(difference(table, arm, HELD, "clean_accuracy"))
    lines.append(
        f"2. minus {HELD}: {100 * mean:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}] points:"
        f" {word(low, high)}"
    )
    accuracy = means(difference(table, arm, END, "clean_accuracy"))
    loss = means(difference(table, arm, END, "clean_loss"))
    loss = {name: value for name, value in loss.items() if name not in accuracy}
    harmed = [f"{n} {100 * v:+.2f} points" for n, v in accuracy.items() if v < -0.005]
    harmed += [f"{n} {v:+.3f} in clean loss" for n, v in loss.items() if v > 0.01]
    gap = means(difference(table, ORACLE, END, "clean_accuracy"))
    overfit = [name for name, value in gap.items() if value >= 0.05]
    gain = 100 * float(np.mean([accuracy[n] for n in overfit])) if overfit else float("nan")
    lines.append(
        f"3. minus {END}: {_said(not harmed)}, harmed: {', '.join(harmed) or 'none'}; where the end"
        f" overfits ({', '.join(overfit) or 'nowhere'}): {gain:+.2f} points"
        f" ({_said(gain >= 5)})"
    )
    worst = means(difference(table, arm, HELD, "clean_accuracy"))
    worst_loss = means(difference(table, arm, HELD, "clean_loss"))
    low_at, high_at = min(worst, key=worst.__getitem__), max(worst_loss, key=worst_loss.__getitem__)
    fine = worst[low_at] >= -0.01 and worst_loss[high_at] <= 0.02
    lines.append(
        f"4. worst condition against {HELD}: {100 * worst[low_at]:+.2f} points ({low_at}),"
        f" {worst_loss[high_at]:+.3f} in clean loss ({high_at}): {_said(fine)}"
    )
    preference = {n for n, c in CONDITIONS.items() if c.data.__name__ == "preferences"}
    plain = {n: accuracy[n] for n in preference & set(accuracy) if not CONDITIONS[n].share}
    swapped = [worst[n] for n in preference & set(worst) if CONDITIONS[n].share]
    if plain and swapped:
        fine = min(plain.values()) >= -0.005 and np.mean(swapped) >= 0
        shown = ", ".join(f"{n} {100 * v:+.2f}" for n, v in sorted(plain.items()))
        lines.append(
            f"5. DPO minus {END}: {shown}; swapped, minus {HELD}: {100 * np.mean(swapped):+.2f}:"
            f" {_said(fine)}"
        )
    return lines


def curve_verdict(rows: list[dict], estimator: str = "shipped") -> list[str]:
    """Point 6: mean errors by condition."""
    groups: dict[str, list[dict]] = defaultdict(list)
    for row in rows:
        if row["estimator"] == estimator:
            groups[str(row["condition"])].append(row)

    def mean(condition: str, column: str) -> float:
        return float(np.mean([float(row[column]) for row in groups[condition]]))

    large = [name for name in groups if CONDITIONS[name].n >= 1000]
    better = [n for n in large if mean(n, "error") < mean(n, "held_out_error")]
    windows = [float(row["windows"]) for g in groups.values() for row in g]
    covered = [float(row["covered"]) for g in groups.values() for row in g]
    cover = float(np.average(covered, weights=windows))
    lines = [
        f"6. curve ({estimator}): error below a 10 % hold-out's in {len(better)} of {len(large)}"
        f" conditions with 1,000 examples or more ({_said(len(better) >= 0.75 * len(large))});"
        f" nominal 90 % intervals hold {100 * cover:.0f} % ({_said(0.8 <= cover <= 0.97)})"
    ]
    for name in sorted(groups):
        if CONDITIONS[name].data.__name__ == "language":
            lines.append(
                f"   {name}: error {mean(name, 'error'):.3f} nats,"
                f" hold-out {mean(name, 'held_out_error'):.3f}"
            )
    return lines


def _said(is_fine: bool) -> str:
    return "passes" if is_fine else "fails"


def draw_differences(rows: list[dict], arms: list[str], path: Path) -> None:
    """Points of clean accuracy to hold-out 10 % and to the end, by arm and condition."""
    table = table_of(rows)
    arms = [arm for arm in arms if arm in table]
    names = [n for n in CONDITIONS if any(key[0] == n for key in table[END])]
    names = [n for n in names if n in means(difference(table, END, END, "clean_accuracy"))]
    figure, axes = plt.subplots(
        2, 1, figsize=(12, 0.52 * len(arms) + 2.6), layout="constrained", sharex=True
    )
    for axis, other in zip(axes, (HELD, END), strict=True):
        values = np.full((len(arms), len(names) + 1), np.nan)
        for i, arm in enumerate(arms):
            found = difference(table, arm, other, "clean_accuracy")
            by_condition = means(found)
            values[i, :-1] = [100 * by_condition.get(n, np.nan) for n in names]
            values[i, -1] = 100 * mean_of(found)[0]
        axis.imshow(values, aspect="auto", cmap="RdBu", vmin=-5, vmax=5)
        for i, j in np.ndindex(values.shape):
            strong = abs(values[i, j]) > 3.5
            weight = "bold" if j == len(names) else "normal"
            axis.text(
                j,
                i,
                f"{values[i, j]:+.1f}",
                ha="center",
                va="center",
                fontsize=6,
                weight=weight,
                color="white" if strong else "black",
            )
        axis.set_yticks(range(len(arms)), arms, fontsize=8)
        axis.set_title(f"points of clean accuracy, minus {other}", fontsize=9)
    axes[1].set_xticks(range(len(names) + 1), [*names, "mean"], rotation=60, ha="right", fontsize=7)
    save(figure, path, dpi=130)


def draw_curves(
    all_runs: list[Runs], estimate: Callable[[Runs], Curve], path: Path, columns: int = 6
) -> None:
    """Estimated and true test loss of one seed for each condition, beside a 10 % hold-out."""
    lines = -(-len(all_runs) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(2.9 * columns, 2.3 * lines), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(all_runs) :]:
        axis.axis("off")
    for axis, runs in zip(axes.flat, all_runs, strict=False):
        curve, sit, held = runs.once(estimate), runs["sit"], runs["hold10"]
        known = np.isfinite(curve.value)
        middle, value, se = curve.middle[known], curve.value[known], curve.se[known]
        axis.plot(sit["at"][1:], sit["noisy_loss"][1:], color=TRUE, lw=1.6, label="true")
        axis.plot(middle, value, color=ESTIMATE, lw=1.4, label="estimated")
        axis.fill_between(middle, value - se, value + se, color=ESTIMATE, alpha=0.2, lw=0)
        axis.plot(curve.middle, curve.train, color=TRAIN, lw=1, ls=":", label="training")
        axis.plot(
            held["at"][1:], held["held_loss"][1:], color=HELD_OUT, lw=0.9, label="10 % held out"
        )
        low = min(np.nanmin(sit["noisy_loss"]), np.nanmin(value))
        high = max(sit["noisy_loss"][1:].max(), np.nanmax(value))
        axis.set_ylim(low - 0.35 * (high - low), high + 0.15 * (high - low))
        axis.set_title(runs.condition.name, fontsize=8)
        axis.tick_params(labelsize=7)
    axes[0, 0].legend(fontsize=6, frameon=False)
    save(figure, path, dpi=120)

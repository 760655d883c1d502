"""Which gate is the default: reads the studies' committed scores, applies the rule of README.md."""

import argparse
from pathlib import Path

from benchmarks.harness.arms import GATES
from benchmarks.harness.figures import percent, plt, save
from benchmarks.harness.provenance import BENCHMARKS, result_name, write_csv
from benchmarks.harness.tables import Found, comparisons, interval, read_scores, seed_means
from matplotlib.axes import Axes

__all__ = ["CONFIRMATION", "SELECTION", "candidates", "choose", "confirmation", "options"]

TAKES = ()
SELECTION = ("sparse_signal", "noisy_labels", "small_lm")
CONFIRMATION = (*SELECTION, "pinn", "inr")
PRESENT, TOLERANCE = "soft-5", -0.01
OPTIONS = tuple(f"soft-32-{what}" for what in ("rho999", "warmup", "decay", "norm", "blend"))
GRAINS = ("moments-32", "row-32", "tensor-32", "moments-row-32", "moments-tensor-32")
MARGIN, STUDY_MARGIN = -0.01, -0.02  # of rule 7
COLOURS = {
    "sparse_signal": "#0072b2",
    "noisy_labels": "#d55e00",
    "small_lm": "#009e73",
    "pinn": "#cc79a7",
    "inr": "#e69f00",
}

Scores = dict[str, list[dict]]


def main(args: argparse.Namespace) -> list[str]:
    """Compare all arms with AdamW, choose, confirm, draw."""
    draws = 500 if args.quick else 10_000
    selection, rows = compared(draws)
    path = args.out / f"{result_name()}.csv"
    write_csv(path, rows)
    draw(rows, path.with_suffix(".png"))
    lines, chosen = choose(rows, selection, draws)
    more = [*options(rows, selection, chosen, draws), *grains(grain_scores(), chosen, draws)]
    fresh = grains_on_fresh_seeds(read_scores(SELECTION, "grains/scores", BENCHMARKS), draws)
    return [*candidates(rows), *lines, *more, *confirmation(rows, chosen), *fresh]


def compared(draws: int, folder: Path = BENCHMARKS) -> tuple[Scores, list[dict]]:
    """Scores of the selection, and all arms against AdamW in both stages."""
    selection = read_scores(SELECTION, "selection_scores", folder)
    report = read_scores(CONFIRMATION, "scores", folder)
    stages = {"selection": selection, "confirmation": report}
    return selection, [
        {"stage": stage, **row}
        for stage, scores in stages.items()
        for row in comparisons(scores, draws)
    ]


def candidates(rows: list[dict]) -> list[str]:
    """Of each gate: smallest tuned and smallest range over the selection studies."""
    lines = []
    for arm, (tuned, spread) in _worst(rows).items():  # the options of rule 6 too
        qualifies = "qualifies" if tuned >= TOLERANCE else "does not qualify"
        lines.append(f"{arm}: tuned at worst {tuned:+.2%}, range {spread:+.2%}, {qualifies}")
    return lines


def choose(rows: list[dict], selection: Scores, draws: int = 10_000) -> tuple[list[str], str]:
    """Rules 1 to 4: what is said, and the default."""
    later = {*OPTIONS, *GRAINS}
    worst = {arm: found for arm, found in _worst(rows).items() if arm not in later}
    fit = {arm: found for arm, found in worst.items() if found[0] >= TOLERANCE}
    if not fit:
        best = max(worst, key=lambda arm: worst[arm][0])
        return [f"no gate qualifies; closest in tuned: {best}"], best
    best = max(fit, key=lambda arm: fit[arm][1])
    lines = [f"largest smallest range: {best}"]
    if fit[best][1] < 0:
        lines.append("AdamW (0, 0) is ahead of every gate by this rule")
    if best == PRESENT:
        return [*lines, f"default: {PRESENT}, as before"], PRESENT
    found = _apart(selection, best, PRESENT, "range", draws)
    lines.append(f"{best} minus {PRESENT} in range: {_said(found)}")
    kept = PRESENT in fit and found[1] <= 0 <= found[2]
    chosen = PRESENT if kept else best
    return [*lines, f"default: {chosen}{', kept' if kept else ''}"], chosen


def options(rows: list[dict], selection: Scores, chosen: str, draws: int = 10_000) -> list[str]:
    """Rule 6: for each option of the chosen gate, whether its other value is better."""
    worst = _worst(rows)
    lines = []
    for arm in (name for name in OPTIONS if name in worst and chosen in worst):
        tuned, spread = worst[arm]
        found = _apart(selection, arm, chosen, "range", draws)
        better = tuned >= TOLERANCE and spread > worst[chosen][1] and found[1] > 0
        lines.append(
            f"{arm}: tuned at worst {tuned:+.2%}, range {spread:+.2%}, range minus that of "
            f"{chosen} {_said(found)}: {'change' if better else 'keep'}"
        )
    return lines


def grain_scores(folder: Path = BENCHMARKS) -> Scores:
    """Of the selection seeds, run again with `GRAINS` beside AdamW and the default."""
    return read_scores(SELECTION, "grains/selection_scores", folder)


def grains(selection: Scores, chosen: str, draws: int = 10_000) -> list[str]:
    """Rules 7 and 8: noise from the moments, and one gate for a row or tensor."""
    worst = _worst([{"stage": "selection", **row} for row in comparisons(selection, draws)])
    lines = []
    for arm in (name for name in GRAINS if name in worst and chosen in worst):
        tuned, spread = worst[arm]
        scores = ("tuned", "range")
        apart = {score: _apart(selection, arm, chosen, score, draws) for score in scores}
        if arm == "moments-32":
            by_study = [
                _apart({study: of_study}, arm, chosen, "range", draws)[0]
                for study, of_study in selection.items()
            ]
            passes = min(low for _, low, _ in apart.values()) > MARGIN
            passes &= min(by_study) >= STUDY_MARGIN
        else:
            passes = spread > worst[chosen][1] and apart["range"][1] > 0
        said = ", ".join(f"{score} {_said(found)}" for score, found in apart.items())
        lines.append(
            f"{arm}: tuned at worst {tuned:+.2%}, range {spread:+.2%}; minus {chosen}: {said}: "
            f"{'passes' if passes and tuned >= TOLERANCE else 'keep'}"
        )
    return lines


def grains_on_fresh_seeds(report: Scores, draws: int = 10_000) -> list[str]:
    """Rule 7 on the seeds that were not chosen on, study by study; and what is left of AdamW."""
    parts = {**{study: {study: scores} for study, scores in report.items()}, "all": report}
    return [
        f"fresh seeds, {arm} minus {base}, {score}, {study}: "
        f"{_said(_apart(scores, arm, base, score, draws))}"
        for arm, base in (("moments-32", "AdamW"), ("soft-32", "AdamW"), ("moments-32", "soft-32"))
        for study, scores in parts.items()
        for score in ("tuned", "range")
        if scores
    ]


def confirmation(rows: list[dict], chosen: str) -> list[str]:
    """Rule 5, on fresh seeds."""
    mine = [r for r in rows if r["stage"] == "confirmation" and r["arm"] == chosen]
    single = [r for r in mine if not r["study"].startswith("all")]
    if not single:
        return [f"confirmation: {chosen} was not run"]
    worst = min(single, key=lambda row: float(row["tuned"]))
    whole = next(r for r in mine if r["study"].startswith("all"))
    tuned = "met" if float(worst["tuned"]) >= TOLERANCE else "MISSED"
    spread = "met" if float(whole["range_low"]) > 0 else "MISSED"
    numbers = tuple(float(whole[f"range{end}"]) for end in ("", "_low", "_high"))
    return [
        f"confirmation, tuned at worst: {worst['study']} {float(worst['tuned']):+.2%} ({tuned})",
        f"confirmation, range over {whole['study']}: {_said(numbers)} ({spread})",
    ]


def _said(found: Found) -> str:
    mean, low, high = found
    return f"{mean:+.2%} [{low:+.2%}, {high:+.2%}]"


def _apart(selection: Scores, arm: str, base: str, score: str, draws: int) -> Found:
    """Difference in a score over all studies, paired by seed: mean and its 95 % interval."""
    mine, other = (
        {
            (study, seed): value
            for study, scores in selection.items()
            for seed, value in seed_means(scores, name, score).items()
        }
        for name in (arm, base)
    )
    return interval({key: mine[key] - other[key] for key in mine if key in other}, draws)


def _worst(rows: list[dict]) -> dict[str, tuple[float, float]]:
    """(smallest tuned, smallest range) of the gates that all selection studies ran."""
    chosen = [r for r in rows if r["stage"] == "selection" and not r["study"].startswith("all")]
    studies = {row["study"] for row in chosen}
    found = {}
    for arm in dict.fromkeys(row["arm"] for row in chosen if row["arm"] in GATES):
        mine = [row for row in chosen if row["arm"] == arm]
        if {row["study"] for row in mine} == studies:
            found[arm] = tuple(min(float(row[s]) for row in mine) for s in ("tuned", "range"))
    return found


def draw(rows: list[dict], path: Path) -> None:
    """Upper panels: selection seeds; lower: fresh ones. A dot for each study, bars are 95 %."""
    stages = list(dict.fromkeys(r["stage"] for r in rows))
    arms = {s: list(dict.fromkeys(r["arm"] for r in rows if r["stage"] == s)) for s in stages}
    heights = [1.5 + len(arms[stage]) for stage in stages]
    fig, axes = plt.subplots(
        len(stages),
        2,
        figsize=(11, 1.5 + 0.33 * sum(heights)),
        squeeze=False,
        dpi=120,
        gridspec_kw={"height_ratios": heights},
    )
    for line, stage in enumerate(stages):
        for column, score in enumerate(("tuned", "range")):
            _panel(axes[line][column], rows, stage, score, arms[stage])
        axes[line][1].set_yticklabels([])
    shown = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, handle)
    fig.legend(
        list(shown.values()), list(shown), loc="outside lower center", ncols=5, frameon=False
    )
    save(fig, path)


def _panel(axis: Axes, rows: list[dict], stage: str, score: str, arms: list[str]) -> None:
    studies = [name for name in COLOURS if any(r["study"] == name for r in rows)]
    for row in rows:
        if row["stage"] != stage or row["study"] not in COLOURS:
            continue
        place = studies.index(row["study"])
        y = arms.index(row["arm"]) + 0.14 * (place - (len(studies) - 1) / 2)
        mean, low, high = percent(row, score, (f"{score}_low", f"{score}_high"))
        axis.errorbar(
            mean,
            y,
            xerr=[[mean - low], [high - mean]],
            fmt="o",
            markersize=3.5,
            linewidth=1,
            color=COLOURS[row["study"]],
            label=row["study"] if row["arm"] == arms[0] else None,
        )
    axis.axvline(0, color="0.3", linewidth=0.8)
    axis.set_xscale("symlog", linthresh=1)
    axis.set(
        yticks=range(len(arms)),
        yticklabels=arms,
        ylim=(len(arms) - 0.4, -0.6),
        title=f"{stage}: {score}",
        xlabel="better than AdamW by, % (linear within 1 %)",
    )
    axis.grid(axis="x", color="0.9")

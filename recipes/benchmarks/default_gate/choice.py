"""The decision rule of README.md, on score rows of several studies."""

import csv
from collections.abc import Sequence
from pathlib import Path

from gate_harness.arms import GATES
from gate_harness.scores import interval, relative

__all__ = ["candidates", "choose", "comparisons", "confirmation", "differences", "read_scores"]

PRESENT, TOLERANCE = "soft-5", -0.01
Scores = dict[str, list[dict[str, str]]]


def read_scores(benchmarks: Path, studies: Sequence[str], stem: str) -> Scores:
    """Committed score rows by study; `metric` and `higher` are columns of each."""
    found: Scores = {}
    for study in studies:
        for path in sorted((benchmarks / study / "results").glob(f"{stem}_*.csv")):
            with path.open(newline="") as file:
                found[study] = list(csv.DictReader(file))
    return found


def differences(rows: list[dict[str, str]], arm: str, score: str) -> dict[int, float]:
    """Relative difference to AdamW by seed, mean over conditions; {} if the arm was not run."""
    values = {
        (row["arm"], row["condition"], row["seed"]): float(row[score])
        for row in rows
        if row["arm"] in (arm, "AdamW") and row[score] != ""
    }
    higher = rows[0]["higher"] in ("1", "True")
    by_seed: dict[int, list[float]] = {}
    for (name, condition, seed), value in values.items():
        base = values.get(("AdamW", condition, seed))
        if name == arm and base is not None:
            by_seed.setdefault(int(seed), []).append(relative(value, base, higher=higher))
    return {seed: sum(found) / len(found) for seed, found in by_seed.items()}


def comparisons(scores: Scores, draws: int = 10_000) -> list[dict]:
    """One row for each study and arm, and for each arm over all studies that ran it."""
    table = []
    arms = dict.fromkeys(row["arm"] for rows in scores.values() for row in rows)
    for arm in (name for name in arms if name != "AdamW"):
        everywhere: dict[str, dict[tuple[str, int], float]] = {"tuned": {}, "range": {}}
        studies = 0
        for study, rows in scores.items():
            found = {score: differences(rows, arm, score) for score in everywhere}
            if not found["tuned"]:
                continue
            studies += 1
            keyed = {
                score: {(study, seed): value for seed, value in by_seed.items()}
                for score, by_seed in found.items()
            }
            for score, values in keyed.items():
                everywhere[score] |= values
            table.append({"study": study, "arm": arm, **_numbers(keyed, draws)})
        table.append({"study": f"all {studies}", "arm": arm, **_numbers(everywhere, draws)})
    return table


def _numbers(values: dict[str, dict[tuple[str, int], float]], draws: int) -> dict[str, str]:
    row = {"seeds": str(len(values["tuned"]))}
    for score, found in values.items():
        mean, low, high = interval(found, draws)
        row |= {score: f"{mean:.5f}", f"{score}_low": f"{low:.5f}", f"{score}_high": f"{high:.5f}"}
    return row


def candidates(rows: list[dict]) -> list[str]:
    """Of each gate: smallest tuned and smallest range over the selection studies."""
    lines = []
    for arm, (tuned, spread) in _worst(rows).items():
        word = "qualifies" if tuned >= TOLERANCE else "does not qualify"
        lines.append(f"{arm}: tuned at worst {tuned:+.2%}, range at worst {spread:+.2%}, {word}")
    return lines


def choose(rows: list[dict], selection: Scores, draws: int = 10_000) -> tuple[list[str], str]:
    """Rules 1 to 4: what is said, and the default."""
    worst = _worst(rows)
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
    mine, present = (
        {
            (study, seed): value
            for study, scores in selection.items()
            for seed, value in differences(scores, arm, "range").items()
        }
        for arm in (best, PRESENT)
    )
    mean, low, high = interval({k: mine[k] - present[k] for k in mine if k in present}, draws)
    lines.append(f"{best} minus {PRESENT} in range: {mean:+.2%} [{low:+.2%}, {high:+.2%}]")
    kept = PRESENT in fit and low <= 0 <= high
    chosen = PRESENT if kept else best
    return [*lines, f"default: {chosen}{', kept' if kept else ''}"], chosen


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
    return [
        f"confirmation, tuned at worst: {worst['study']} {float(worst['tuned']):+.2%} ({tuned})",
        f"confirmation, range over {whole['study']}: {float(whole['range']):+.2%} "
        f"[{float(whole['range_low']):+.2%}, {float(whole['range_high']):+.2%}] ({spread})",
    ]


def _worst(rows: list[dict]) -> dict[str, tuple[float, float]]:
    """(smallest tuned, smallest range) of the gates that all selection studies ran."""
    chosen = [r for r in rows if r["stage"] == "selection" and not r["study"].startswith("all")]
    studies = {row["study"] for row in chosen}
    found = {}
    for arm in dict.fromkeys(row["arm"] for row in chosen if row["arm"] in GATES):
        mine = [row for row in chosen if row["arm"] == arm]
        if {row["study"] for row in mine} == studies:
            found[arm] = (
                min(float(row["tuned"]) for row in mine),
                min(float(row["range"]) for row in mine),
            )
    return found

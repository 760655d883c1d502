"""Arms against AdamW from committed score rows, study by study."""

import csv
from collections.abc import Sequence
from pathlib import Path

from gate_harness.scores import interval, relative

__all__ = ["Scores", "comparisons", "differences", "read_scores"]

Scores = dict[str, list[dict[str, str]]]


def read_scores(benchmarks: Path, studies: Sequence[str], stem: str) -> Scores:
    """Committed score rows by study, on the study's first metric, which is its main one."""
    found: Scores = {}
    for study in studies:
        for path in sorted((benchmarks / study / "results").glob(f"{stem}_*.csv")):
            with path.open(newline="") as file:
                rows = list(csv.DictReader(file))
            found[study] = [row for row in rows if row["metric"] == rows[0]["metric"]]
    return found


def differences(rows: list[dict[str, str]], arm: str, score: str) -> dict[int, float]:
    """Relative difference to AdamW by seed, mean over conditions; {} if the arm was not run."""
    values = {
        (row["arm"], row["condition"], row["seed"]): float(row[score])
        for row in rows
        if row["arm"] in (arm, "AdamW") and row[score] != ""
    }
    higher = str(rows[0]["higher"]) in ("1", "True")
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

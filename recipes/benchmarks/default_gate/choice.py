"""The decision rule of README.md, on score rows of several studies."""

from gate_harness.arms import GATES
from gate_harness.comparison import Scores, differences
from gate_harness.scores import interval

__all__ = ["candidates", "choose", "confirmation", "options"]

PRESENT, TOLERANCE = "soft-5", -0.01
OPTIONS = tuple(f"soft-32-{what}" for what in ("rho999", "warmup", "decay", "norm", "blend"))


def candidates(rows: list[dict]) -> list[str]:
    """Of each gate: smallest tuned and smallest range over the selection studies."""
    lines = []
    for arm, (tuned, spread) in _worst(rows).items():  # the options of rule 6 too
        word = "qualifies" if tuned >= TOLERANCE else "does not qualify"
        lines.append(f"{arm}: tuned at worst {tuned:+.2%}, range at worst {spread:+.2%}, {word}")
    return lines


def choose(rows: list[dict], selection: Scores, draws: int = 10_000) -> tuple[list[str], str]:
    """Rules 1 to 4: what is said, and the default."""
    worst = {arm: found for arm, found in _worst(rows).items() if arm not in OPTIONS}
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
    mean, low, high = _apart(selection, best, PRESENT, draws)
    lines.append(f"{best} minus {PRESENT} in range: {mean:+.2%} [{low:+.2%}, {high:+.2%}]")
    kept = PRESENT in fit and low <= 0 <= high
    chosen = PRESENT if kept else best
    return [*lines, f"default: {chosen}{', kept' if kept else ''}"], chosen


def options(rows: list[dict], selection: Scores, chosen: str, draws: int = 10_000) -> list[str]:
    """Rule 6: for each option of the chosen gate, whether its other value is better."""
    worst = _worst(rows)
    lines = []
    for arm in (name for name in OPTIONS if name in worst and chosen in worst):
        tuned, spread = worst[arm]
        mean, low, high = _apart(selection, arm, chosen, draws)
        better = tuned >= TOLERANCE and spread > worst[chosen][1] and low > 0
        lines.append(
            f"{arm}: tuned at worst {tuned:+.2%}, range at worst {spread:+.2%}, range minus that "
            f"of {chosen} {mean:+.2%} [{low:+.2%}, {high:+.2%}]: {'change' if better else 'keep'}"
        )
    return lines


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


def _apart(selection: Scores, arm: str, base: str, draws: int) -> tuple[float, float, float]:
    """Difference in range over all studies, paired by seed: mean and its 95 % interval."""
    mine, other = (
        {
            (study, seed): value
            for study, scores in selection.items()
            for seed, value in differences(scores, name, "range").items()
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
            found[arm] = (
                min(float(row["tuned"]) for row in mine),
                min(float(row["range"]) for row in mine),
            )
    return found

"""The decision rule: which gate loses to AdamW on which toy, and what repairs it."""

from collections.abc import Sequence

from gate_harness.arms import GATES
from gate_harness.scores import interval, relative
from remedies import REMEDIES

__all__ = ["MARGIN", "difference", "judge", "judge_remedy", "summarise", "verdict"]

MARGIN = 0.01
Found = tuple[float, float, float]


def difference(
    scores: Sequence[dict], toy: str, arm: str, base: str, column: str = "tuned"
) -> Found:
    """Mean relative difference of accuracies, arm - base, paired by seed, and its 95 % interval.

    Args:
        scores: Rows of all arms and toys.
        toy: Which toy.
        arm: Judged.
        base: Compared with.
        column: "tuned" (each at its own rate), "in_place" (both at AdamW's) or "range".
    """
    mine, other = (
        {int(r["seed"]): float(r[column]) for r in scores if (r["task"], r["arm"]) == (toy, name)}
        for name in (arm, base)
    )
    return interval({(toy, s): relative(mine[s], other[s], higher=True) for s in mine})


def judge(found: Found) -> str:
    """Rule 2: broken, unharmed or undecided, by where the interval lies around -1 %."""
    _, low, high = found
    return "broken" if high < -MARGIN else "unharmed" if low > -MARGIN else "undecided"


def judge_remedy(against_adamw: Found, against_gate: Found) -> str:
    """Rule 3, for a remedy of a gate that is broken."""
    if judge(against_adamw) == "unharmed":
        return "repairs"
    return "helps" if against_gate[1] > 0 else "does not help"


def summarise(scores: Sequence[dict]) -> list[dict]:
    """One row for each toy and arm: means, differences with intervals, words of the rule."""
    rows = []
    keys = dict.fromkeys((r["task"], r["arm"]) for r in scores)
    for toy, arm in keys:
        mine = [r for r in scores if (r["task"], r["arm"]) == (toy, arm)]
        row: dict = {"task": toy, "arm": arm}
        for column in ("tuned", "in_place", "range", "loss", "probe", "step_ratio"):
            values = [float(r[column]) for r in mine if r[column] != ""]
            row[column] = f"{sum(values) / len(values):.4f}" if values else ""
        jumps = [int(r["jump"]) for r in mine if r["jump"] != ""]
        row["jumps"] = f"{sum(jumps)}/{len(jumps)}" if jumps else ""
        jumps = [int(r["jump_in_place"]) for r in mine if r["jump"] != ""]
        row["jumps_in_place"] = f"{sum(jumps)}/{len(jumps)}" if jumps else ""
        for column in ("tuned", "in_place", "range"):
            found = None
            if all(r[column] != "" for r in mine):
                found = difference(scores, toy, arm, "AdamW", column)
            for place, name in enumerate(("", " low", " high")):
                row[f"{column} vs AdamW{name}"] = f"{found[place]:.5f}" if found else ""
            row[f"{column} verdict"] = judge(found) if found else ""
        row["remedy"] = _remedy(scores, toy, arm, keys)
        rows.append(row)
    return rows


def _remedy(scores: Sequence[dict], toy: str, arm: str, keys: dict) -> str:
    kind, _, gate = arm.rstrip(")").partition("(")
    if kind not in REMEDIES or (toy, gate) not in keys:
        return ""
    if judge(difference(scores, toy, gate, "AdamW")) != "broken":
        return ""
    return judge_remedy(difference(scores, toy, arm, "AdamW"), difference(scores, toy, arm, gate))


def verdict(summary: Sequence[dict]) -> list[str]:
    """Lines for the terminal: every bare gate, and the remedies of those that are broken."""
    lines = []
    for row in summary:
        if row["arm"] not in GATES or row["arm"] == "AdamW":
            continue
        toy, arm = row["task"], row["arm"]
        found = {r["arm"]: r["remedy"] for r in summary if r["task"] == toy and r["remedy"]}
        mine = [
            f"{kind} {found[f'{kind}({arm})']}" for kind in REMEDIES if f"{kind}({arm})" in found
        ]
        lines.append(
            f"{toy}: {arm} {_percent(row, 'tuned')} tuned: {row['tuned verdict']}; "
            f"{_percent(row, 'in_place')} at AdamW's rate: {row['in_place verdict']}"
            + (f"; remedies: {', '.join(mine)}" if mine else "")
        )
    return lines


def _percent(row: dict, column: str) -> str:
    mean, low, high = (
        100 * float(row[f"{column} vs AdamW{part}"]) for part in ("", " low", " high")
    )
    return f"{mean:+.1f} % [{low:+.1f}, {high:+.1f}]"

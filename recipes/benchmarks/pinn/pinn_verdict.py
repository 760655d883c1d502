"""The lines of the README's decision rule, from the scores."""

from collections.abc import Sequence

from crossing import ratio
from gate_harness.scores import interval, relative

__all__ = ["difference", "verdict", "word"]

CLAIM = 2.4


def word(low: float, high: float, zero: float = 0.0) -> str:
    """Better, worse or level, by the interval's place."""
    return "better" if low > zero else "worse" if high < zero else "level"


def difference(
    rows: Sequence[dict], arm: str, condition: str, column: str, base: str = "AdamW"
) -> tuple[float, float, float]:
    """Relative difference of the error to `base`, positive = better: mean and interval."""
    of = {
        (row["arm"], int(row["seed"])): float(row[column])
        for row in rows
        if row["condition"] == condition
    }
    return interval(
        {
            (condition, seed): relative(value, of[base, seed], higher=False)
            for (name, seed), value in of.items()
            if name == arm
        }
    )


def verdict(rows: Sequence[dict]) -> list[str]:
    """One line for each arm and condition; then gates against their controls."""
    lines = []
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    for condition in dict.fromkeys(row["condition"] for row in rows):
        never = {
            arm: sum(
                int(r["first_never"])
                for r in rows
                if r["arm"] == arm and r["condition"] == condition
            )
            for arm in arms
        }
        lines.append(f"{condition}: AdamW never reached the level in {never['AdamW']} tuned runs")
        for arm in arms[1:]:
            lines.append(f"{condition}, {arm}: {_line(rows, arm, condition, never[arm])}")
        for other in arms:
            gate = other[other.find("(") + 1 : -1]
            if "(" in other and gate in arms:
                lines.append(
                    f"{condition}, {gate} over {other}: {_line(rows, gate, condition, 0, other)}"
                )
    return lines


def _line(rows, arm: str, condition: str, never: int, base: str = "AdamW") -> str:
    mean, low, high = ratio(rows, arm, condition, base)
    speed = word(low, high, 1.0)
    text = f"{mean:.2f}x [{low:.2f}, {high:.2f}] as fast to the level: {speed}"
    text += f" (claim {CLAIM}x: {'inside' if low <= CLAIM <= high else 'not'})" * (base == "AdamW")
    text += f", never in {never}" * (never > 0)
    for column in ("tuned", "range"):
        mean, low, high = difference(rows, arm, condition, column, base)
        text += f"; {column} error {mean:+.1%} [{low:+.1%}, {high:+.1%}] {word(low, high)}"
    return text

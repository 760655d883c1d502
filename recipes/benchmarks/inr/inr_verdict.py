"""The lines of the README's decision rule, from the scores and the members' rows."""

from collections.abc import Sequence

from gate_harness.scores import interval, relative

__all__ = ["decibels", "memorised", "relative_difference", "verdict", "word"]

COLUMNS = ("tuned", "tuned_stopped", "range")
Found = tuple[float, float, float]


def word(low: float, high: float) -> str:
    """Better, worse or level, by the interval's place."""
    return "better" if low > 0 else "worse" if high < 0 else "level"


def _pairs(rows: Sequence[dict], arm: str, column: str, base: str) -> dict:
    of = {(r["arm"], r["condition"], int(r["seed"])): float(r[column]) for r in rows}
    return {
        (condition, seed): (value, of[base, condition, seed])
        for (name, condition, seed), value in of.items()
        if name == arm
    }


def decibels(rows: Sequence[dict], arm: str, column: str, base: str = "AdamW") -> Found:
    """PSNR minus that of `base`, mean and interval over seeds, images weighted alike."""
    pairs = _pairs(rows, arm, column, base)
    return interval({key: mine - other for key, (mine, other) in pairs.items()})


def relative_difference(rows: Sequence[dict], arm: str, column: str, base: str = "AdamW") -> Found:
    """The same as a share of `base`'s PSNR."""
    pairs = _pairs(rows, arm, column, base)
    return interval({key: relative(*pair, higher=True) for key, pair in pairs.items()})


def memorised(rows: Sequence[dict], arm: str, lr: str) -> tuple[float, float]:
    """Mean PSNR lost since the best evaluation, and mean share of the noise, both at the end."""
    here = [row for row in rows if row["arm"] == arm and row["lr"] == lr]
    lost = sum(float(row["psnr_max"]) - float(row["psnr_end"]) for row in here)
    share = sum(float(row["noise_share_end"]) for row in here)
    return lost / len(here), share / len(here)


def verdict(members: Sequence[dict], scores: Sequence[dict]) -> list[str]:
    """What AdamW memorises; each arm against AdamW; gates against their controls."""
    lines = []
    for lr in dict.fromkeys(row["lr"] for row in members):
        lost, share = memorised(members, "AdamW", lr)
        lines.append(f"AdamW, lr {lr}: {lost:.2f} dB below its best at the end, noise {share:.0%}")
    arms = list(dict.fromkeys(row["arm"] for row in scores))
    pairs = [(arm, "AdamW") for arm in arms[1:]]
    pairs += [(arm[arm.find("(") + 1 : -1], arm) for arm in arms if "(" in arm]
    pairs = [(arm, base) for arm, base in pairs if arm in arms]
    for arm, base in pairs:
        text = f"{arm} over {base}:"
        for column in COLUMNS:
            mean, low, high = decibels(scores, arm, column, base)
            text += f" {column} {mean:+.2f} dB [{low:+.2f}, {high:+.2f}] {word(low, high)}"
            mean, low, high = relative_difference(scores, arm, column, base)
            text += f" ({mean:+.1%} [{low:+.1%}, {high:+.1%}]);"
        lines.append(text.rstrip(";"))
    return lines

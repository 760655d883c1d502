"""Differences to AdamW and to the controls, and the decision rule of the README."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from gate_harness.scores import interval, relative

__all__ = ["COLUMNS", "GROUPS", "differences", "found", "table", "verdict", "word"]

COLUMNS = ("tuned", "tuned_stopped", "range")
JUDGED = ("soft-32", "soft-5", "paper", "snr-32")
CLEAN_COST = -0.005


def noisy(condition: str) -> bool:
    """Whether some labels are wrong."""
    return not condition.endswith(" 0%")


GROUPS = {
    "all": lambda condition: True,
    "wrong labels": noisy,
    "clean labels": lambda condition: not noisy(condition),
}


def differences(
    scores: list[dict], arm: str, base: str, column: str, metric: str = "accuracy"
) -> dict[tuple[str, int], float]:
    """Relative differences of two arms by (condition, seed), positive where `arm` is better."""
    values: dict[str, dict[tuple[str, int], float]] = {arm: {}, base: {}}
    higher = True
    for row in scores:
        if row["metric"] == metric and row["arm"] in values and row[column] != "":
            values[row["arm"]][row["condition"], int(row["seed"])] = float(row[column])
            higher = bool(int(row["higher"]))
    return {
        key: relative(value, values[base][key], higher=higher)
        for key, value in values[arm].items()
        if key in values[base]
    }


def found(
    scores: list[dict], arm: str, base: str, column: str, group: str, metric: str = "accuracy"
) -> tuple[float, float, float]:
    """Mean over conditions of a group, and its interval."""
    paired = differences(scores, arm, base, column, metric)
    return interval({key: v for key, v in paired.items() if GROUPS[group](key[0])})


def word(low: float, high: float) -> str:
    """Of an interval of a difference."""
    return "better" if low > 0 else "worse" if high < 0 else "level"


def table(scores: list[dict]) -> list[dict]:
    """Every arm against AdamW, and every gate against its controls."""
    arms = list(dict.fromkeys(row["arm"] for row in scores))
    pairs = [(arm, "AdamW") for arm in arms if arm != "AdamW"]
    for control in arms:
        gated = control.partition("(")[2].rstrip(")")
        if gated in arms:
            pairs.append((gated, control))
    rows = []
    for metric in dict.fromkeys(row["metric"] for row in scores):
        for arm, base in pairs:
            for column in COLUMNS:
                for group in GROUPS:
                    mean, low, high = found(scores, arm, base, column, group, metric)
                    rows.append(
                        {"metric": metric, "arm": arm, "base": base, "score": column}
                        | {"conditions": group, "mean": f"{mean:.5f}"}
                        | {"low": f"{low:.5f}", "high": f"{high:.5f}", "word": word(low, high)}
                    )
    return rows


def verdict(scores: list[dict]) -> list[str]:
    """The decision rule of the README."""
    arms = {row["arm"] for row in scores}
    lines = []
    for arm in filter(arms.__contains__, JUDGED):
        words = {}
        for column in COLUMNS:
            mean, low, high = found(scores, arm, "AdamW", column, "wrong labels")
            words[column] = word(low, high)
            lines.append(
                f"{arm}, wrong labels, {column}: {mean:+.2%} [{low:+.2%}, {high:+.2%}] "
                f"relative to AdamW: {words[column]}"
            )
        mean, low, high = found(scores, arm, "AdamW", "tuned", "clean labels")
        cost = "costs accuracy" if high < 0 and mean < CLEAN_COST else "costs at most 0.5 %"
        lines.append(f"{arm}, clean labels, tuned: {mean:+.2%} [{low:+.2%}, {high:+.2%}]: {cost}")
        own = []
        for control in filter(arms.__contains__, (f"norm({arm})", f"ratio({arm})")):
            for column in ("tuned", "range"):
                mean, low, high = found(scores, arm, control, column, "wrong labels")
                own.append(word(low, high))
                lines.append(
                    f"{arm} against {control}, {column}: {mean:+.2%} [{low:+.2%}, {high:+.2%}]: "
                    f"{own[-1]}"
                )
        lines.append(f"=> {arm}: {conclusion(words['tuned'], words['range'], own)}")
    return lines


def conclusion(tuned: str, ranged: str, own: list[str]) -> str:
    """One phrase of the words against AdamW and against the controls."""
    if tuned == "better" and ranged == "better":
        text = "helps with wrong labels"
    elif ranged == "better" and tuned == "level":
        text = "helps with wrong labels where the rate is not tuned, and only there"
    elif "worse" in (tuned, ranged):
        text = f"does not help with wrong labels (tuned {tuned}, range {ranged})"
    else:
        text = "no difference shown, or in one of two scores only"
    if not text.startswith("helps") or not own:
        return text
    if all(w == "better" for w in own):
        return text + "; the gain is the gate's own"
    return text + "; the gain is not the gate's alone: a control reaches it in some score"

"""Differences to AdamW and to the controls, and the decision rule of the README."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from gate_harness.scores import interval, relative

__all__ = ["COLUMNS", "GROUPS", "basis_effect", "differences", "found", "table", "verdict", "word"]

COLUMNS = ("tuned", "tuned_stopped", "range")
JUDGED = ("soft-32", "soft-5", "paper", "snr-32")
SPARSE = ("linear sparse", "net sparse")
OTHER = ("linear rotated", "net rotated", "linear dense")
GROUPS = {"all": (*SPARSE, *OTHER), "sparse": SPARSE, "rotated or dense": OTHER}

Paired = dict[tuple[str, int], float]


def differences(scores: list[dict], arm: str, base: str, column: str) -> Paired:
    """Relative differences of two arms by (condition, seed), positive where `arm` is better."""
    values: dict[str, Paired] = {arm: {}, base: {}}
    for row in scores:
        if row["arm"] in values and row[column] != "":
            values[row["arm"]][row["condition"], int(row["seed"])] = float(row[column])
    return {
        key: relative(value, values[base][key], higher=False)
        for key, value in values[arm].items()
        if key in values[base]
    }


def found(
    scores: list[dict], arm: str, base: str, column: str, group: str
) -> tuple[float, float, float]:
    """Mean over conditions of a group, and its interval."""
    paired = differences(scores, arm, base, column)
    return interval({key: v for key, v in paired.items() if key[0] in GROUPS[group]})


def basis_effect(scores: list[dict], arm: str, column: str) -> tuple[float, float, float]:
    """Relative difference to AdamW on sparse minus that on rotated data of the same seed."""
    paired = differences(scores, arm, "AdamW", column)
    return interval(
        {
            (name, seed): value - paired[f"{name} rotated", seed]
            for (condition, seed), value in paired.items()
            for name, kind in [condition.split(" ")]
            if kind == "sparse"
        }
    )


def word(low: float, high: float) -> str:
    """Of an interval of a difference."""
    return "better" if low > 0 else "worse" if high < 0 else "level"


def table(scores: list[dict]) -> list[dict]:
    """Every arm against AdamW, every gate against its controls, and the effect of the basis."""
    arms = list(dict.fromkeys(row["arm"] for row in scores))
    pairs = [(arm, "AdamW") for arm in arms if arm != "AdamW"]
    for control in arms:
        gated = control.partition("(")[2].rstrip(")")
        if gated in arms:
            pairs.append((gated, control))
    rows = []
    for arm, base in pairs:
        for column in COLUMNS:
            triples = {group: found(scores, arm, base, column, group) for group in GROUPS}
            if base == "AdamW":
                triples["sparse minus rotated"] = basis_effect(scores, arm, column)
            rows += [
                {"arm": arm, "base": base, "score": column, "conditions": group}
                | {"mean": f"{mean:.5f}", "low": f"{low:.5f}", "high": f"{high:.5f}"}
                | {"word": word(low, high)}
                for group, (mean, low, high) in triples.items()
            ]
    return rows


def verdict(scores: list[dict]) -> list[str]:
    """The decision rule of the README."""
    arms = {row["arm"] for row in scores}
    lines = []

    def judge(name: str, triple: tuple[float, float, float]) -> str:
        mean, low, high = triple
        lines.append(f"{name}: {mean:+.1%} [{low:+.1%}, {high:+.1%}]: {word(low, high)}")
        return word(low, high)

    for arm in filter(arms.__contains__, JUDGED):
        words = {
            (group, column): judge(
                f"{arm}, {group}, {column}, relative to AdamW",
                found(scores, arm, "AdamW", column, group),
            )
            for group in ("sparse", "rotated or dense")
            for column in COLUMNS
        }
        basis = judge(f"{arm}, sparse minus rotated, tuned", basis_effect(scores, arm, "tuned"))
        own = [
            judge(f"{arm} against {control}, sparse, {c}", found(scores, arm, control, c, "sparse"))
            for control in filter(arms.__contains__, (f"norm({arm})", f"ratio({arm})"))
            for c in ("tuned", "range")
        ]
        lines.append(f"=> {arm}: {conclusion(words, basis, own)}")
    return lines


def conclusion(words: dict[tuple[str, str], str], basis: str, own: list[str]) -> str:
    """One phrase of the words on sparse and on other data, of the basis, and against controls."""
    sparse, other = words["sparse", "tuned"], words["rotated or dense", "tuned"]
    if sparse != "better":
        return f"no win on sparse signals with a tuned rate ({sparse}); elsewhere {other}"
    text = f"wins on sparse signals with a tuned rate; rotated or dense: {other}"
    text += {
        "better": "; the gain needs the signal along the coordinates",
        "level": "; that the coordinates matter is not shown",
        "worse": "; the gain is larger without the coordinates",
    }[basis]
    if own:
        alone = all(w == "better" for w in own)
        text += "; the gain is the gate's own" if alone else "; a control reaches the gain"
    return text

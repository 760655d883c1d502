"""The tables as text for people."""

from collections.abc import Iterable

from rows import METRICS
from runs import title

__all__ = ["text_of"]

# Columns of each table; "+-" is the difference with its interval.
SHOWN = {
    "tuned": ("at", "seeds", "accuracy", "+-", "reward", "kl", "flipped_fitted", "clean_fitted"),
    "tuned by reward": ("at", "seeds", "accuracy", "reward", "reward +-", "kl"),
    "default": ("at", "seeds", "accuracy", "+-", "reward", "kl", "flipped_fitted", "clean_fitted"),
    "robust, mean": ("at", "lrs", "seeds", "accuracy", "+-", "reward", "kl"),
    "robust, worst": ("at", "lrs", "seeds", "accuracy", "+-", "reward", "kl"),
    "matched KL": ("at", "lrs", "seeds", "reward", "kl", "against", "+-"),
    "equal clean fit": ("at", "lrs", "seeds", "clean_fitted", "flipped_fitted", "+-", "reward"),
    "noise": (
        *("at", "n", "noise_rate", "e_hat", "e_hat error", "largest error", "covered"),
        *("auc", "auc_late", "accuracy", "best accuracy"),
    ),
}
TITLES = {
    "tuned": "TUNED: learning rate and epoch of the best clean accuracy",
    "tuned by reward": "TUNED by the reward of samples",
    "default": "DEFAULT: learning rate 3e-4, last epoch or stop; against tuned A1",
    "robust, mean": "ROBUST, mean over learning rates; against tuned A1",
    "robust, worst": "ROBUST, worst learning rate, and largest KL; against tuned A1",
    "matched KL": "REWARD AT MATCHED KL",
    "equal clean fit": "WRONG LABELS FITTED AT EQUAL CLEAN FIT; against A1",
    "noise": "NOISE RATE AND FLIPS from the margins of the first epoch",
}
NAMES = {**{metric: metric.replace("_", " ") for metric in METRICS}, "+-": "difference"}


def text_of(lines: list[dict], arms: Iterable[str] = ()) -> str:
    """All tables, one below the other.

    Args:
        lines: From `scores.lines_of`, or read back from a file.
        arms: Those to show; all by default.
    """
    arms, blocks = set(arms), []
    for table, columns in SHOWN.items():
        for setting in dict.fromkeys(map(_setting, lines)):
            here = [
                line
                for line in lines
                if line["table"] == table
                and _setting(line) == setting
                and (not arms or line["arm"] in arms)
            ]
            if here:
                heading = f"{TITLES[table]}. {', '.join(map(str, setting))}"
                blocks.append(f"{heading}\n{_aligned(here, columns)}")
    return "\n\n".join(blocks)


def _setting(line: dict) -> tuple:
    beta = "" if float(line["beta"]) == 0.1 else f"beta {line['beta']}"
    schedule = "" if line["schedule"] == "constant" else f"{line['schedule']} decay"
    return tuple(part for part in (line["condition"], beta, schedule) if part)


def _aligned(lines: list[dict], columns: tuple[str, ...]) -> str:
    table = [["arm", *(NAMES.get(name, name) for name in columns)]]
    for line in lines:
        table.append([title(line["arm"]), *(_cell(line, name) for name in columns)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    )


def _cell(line: dict, name: str) -> str:
    if name.endswith("+-"):
        kind = name.removesuffix("+-")
        found = [line[f"{kind}{part}"] for part in ("difference", "low", "high")]
        if found[0] == "":
            return ""
        mean, low, high = (f"{float(v):+.3f}" if v != "" else "?" for v in found)
        return mean if low == "?" else f"{mean} [{low}, {high}]"
    value = line[name]
    if name in ("n", "lrs", "at", "seeds", "against") or value == "":
        return str(value)
    return f"{float(value):.2f}" if name == "kl" else f"{float(value):.3f}"

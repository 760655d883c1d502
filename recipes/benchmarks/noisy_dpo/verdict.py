"""The decision rule of the README, applied to the tables."""

from collections.abc import Iterator

from scores import AGAINST, BASELINE, DEFAULT_LR, ROBUST

__all__ = ["verdict"]

CLEAN, NOISY = "flips 0", "flips 30"
WITHIN, WITHIN_CLEAN = -0.01, -0.005  # of clean accuracy
SMALLEST_AUC, SURE_FROM, LARGEST_ERROR = 0.85, 0.85, 0.05
GATE = "A9"


def verdict(lines: list[dict]) -> Iterator[str]:
    """One line for each target and arm that the tables can answer; `lines` from `lines_of`."""
    lines = [line for line in lines if (line["beta"], line["schedule"]) == (0.1, "constant")]
    seeds = sorted({line["seeds"] for line in lines if line["table"] == "tuned"})
    yield f"seeds: {', '.join(seeds)}"
    yield from _robustness(lines)
    yield from _detection(lines)
    yield from _rates(lines)
    yield from _gate(lines)
    yield from _mechanism(lines)


def _robustness(lines: list[dict]) -> Iterator[str]:
    """Targets 1 and 2: the worst learning rate, without tuning, against tuned A1."""
    complete = f"{len(ROBUST)} of {len(ROBUST)}"
    found = {
        (line["arm"], line["at"].split(", worst")[0], line["condition"]): line
        for line in lines
        if line["table"] == "robust, worst" and line["lrs"] == complete
    }
    for arm, end, _ in [key for key in found if key[2] == NOISY]:
        noisy, clean = found[arm, end, NOISY], found.get((arm, end, CLEAN))
        good = noisy["difference"] >= WITHIN and noisy["kl difference"] <= 0
        line = (
            f"1. {arm} ({end}), {NOISY}: {_word(good)}, {_points(noisy)} points, largest KL "
            f"{noisy['kl']:.1f} ({noisy['kl difference']:+.1f})"
        )
        if clean is not None:
            fine = clean["difference"] >= WITHIN_CLEAN
            line += f"; 2. {CLEAN}: {_word(fine)}, {_points(clean)} points"
        yield line
    if not found:
        yield "1. and 2.: no arm has all learning rates"


def _detection(lines: list[dict]) -> Iterator[str]:
    """Target 3."""
    for line in _noise_of(lines, BASELINE):
        if line["auc"] != "" and line["best accuracy"] >= SURE_FROM:
            yield (
                f"3. {line['condition']}, {line['at']}: {_word(line['auc'] >= SMALLEST_AUC)}, AUC "
                f"{line['auc']:.3f} (second half of the epoch {line['auc_late']:.3f}) at best "
                f"accuracy {line['best accuracy']:.3f}"
            )


def _rates(lines: list[dict]) -> Iterator[str]:
    """Target 4, at the default learning rate."""
    for line in _noise_of(lines, BASELINE):
        if line["at"] == f"lr {DEFAULT_LR:g}":
            yield (
                f"4. {line['condition']}: {_word(line['e_hat error'] <= LARGEST_ERROR)}, noise "
                f"rate {line['noise_rate']:.3f}, estimate {line['e_hat']:.3f}, mean error "
                f"{line['e_hat error']:.3f}, largest {line['largest error']:.3f}"
            )


def _gate(lines: list[dict]) -> Iterator[str]:
    """Target 5: at two noise rates above zero, against all rivals."""
    areas = [
        line
        for line in lines
        if (line["table"], line["at"], line["arm"]) == ("matched KL", "area", GATE)
    ]
    won = []
    for condition in dict.fromkeys(line["condition"] for line in areas):
        mine = {line["against"]: line for line in areas if line["condition"] == condition}
        gaps = ", ".join(
            f"{name} {line['difference']:+.3f} [{line['low']}, {line['high']}]"
            for name, line in mine.items()
        )
        yield f"5. {condition}: {GATE}'s mean reward over KL 0 to 10, minus that of {gaps}"
        beaten = [name for name, line in mine.items() if line["low"] != "" and line["low"] > 0]
        if condition.startswith("flips") and condition != CLEAN and len(beaten) == len(AGAINST):
            won.append(condition)
    yield f"5. {_word(len(won) >= 2)}: intervals above 0 against all of {', '.join(AGAINST)}: " + (
        ", ".join(won) or "nowhere"
    )


def _mechanism(lines: list[dict]) -> Iterator[str]:
    """Target 6."""
    for line in lines:
        if (line["table"], line["arm"]) != ("equal clean fit", GATE) or line["high"] == "":
            continue
        yield (
            f"6. {line['condition']}, clean fit {line['at'].split(':')[0]}: "
            f"{_word(line['high'] < 0)}, wrong labels fitted {line['flipped_fitted']:.3f}, minus "
            f"{BASELINE}'s {line['difference']:+.3f} [{line['low']}, {line['high']}]"
        )


def _noise_of(lines: list[dict], arm: str) -> list[dict]:
    return [line for line in lines if line["table"] == "noise" and line["arm"] == arm]


def _points(line: dict) -> str:
    return f"{100 * line['difference']:+.1f}"


def _word(good: bool) -> str:
    return "met" if good else "missed"

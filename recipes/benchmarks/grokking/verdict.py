"""The lines of the README's decision rule."""

import math

from grokking_scores import PAPER_RATIO, Cell, Steps, best_cell, median, ratio, tuned

__all__ = ["lines_of"]

JUDGED = ("paper", "soft-5", "soft-32")
CONTROLS = ("norm", "mask", "ratio")


def lines_of(found: dict[str, dict[Cell, Steps]], budget: int) -> list[str]:
    """Verdicts in the order of the rule; a line whose arms were not run is left out."""
    if "AdamW" not in found:
        return ["AdamW was not run: nothing to compare with"]
    lines = []
    for arm in JUDGED:
        if arm in found:
            lines += _equal_settings(found, arm, budget)
    best = {arm: tuned(cells, budget)[0] for arm, cells in found.items()}
    for arm, steps in best.items():
        compared = ratio(best["AdamW"], steps, budget)
        cell = best_cell(found[arm], budget)
        hindsight = found[arm][cell]
        lines.append(
            f"tuned {arm}: {_shown(steps, budget)} steps; AdamW / arm {compared}: {compared.word} "
            f"(in hindsight lr {cell[0]} decay {cell[1]}: {_shown(hindsight, budget)}, "
            f"{sum(map(math.isfinite, hindsight.values()))} of {len(hindsight)} done)"
        )
    for arm in JUDGED:
        if arm in best:
            met = "met" if ratio(best["AdamW"], best[arm], budget).word == "faster" else "missed"
            lines.append(f"target 'faster than AdamW with tuned decay', {arm}: {met}")
    for gated in ("soft-5", "soft-32"):
        for arm in [f"{kind}({gated})" for kind in CONTROLS]:
            if arm in best and gated in best:
                compared = ratio(best[arm], best[gated], budget)
                lines.append(f"{gated} against {arm}: control / arm {compared}: {compared.word}")
    for arm in JUDGED:
        if arm in best and f"{arm}-decay" in best:
            compared = ratio(best[arm], best[f"{arm}-decay"], budget)
            lines.append(f"{arm}, gated decay: ungated / gated {compared}: {compared.word}")
    return lines


def _shown(steps: Steps, budget: int) -> str:
    middle = median(steps)[0]
    return f"> {budget}" if math.isinf(middle) else f"{middle:g}"


def _equal_settings(found: dict[str, dict[Cell, Steps]], arm: str, budget: int) -> list[str]:
    lines, reached = [], []
    for cell, steps in found[arm].items():
        base = found["AdamW"].get(cell)
        if base is None:
            continue
        compared = ratio(base, steps, budget)
        if compared[0] >= PAPER_RATIO:
            reached.append(cell)
        lines.append(
            f"{arm} at lr {cell[0]}, decay {cell[1]}: AdamW / {arm} {compared}: {compared.word}"
        )
    cells = ", ".join(f"lr {lr} decay {decay}" for lr, decay in reached) or "none"
    return [*lines, f"cells where {arm} is at least {PAPER_RATIO} times faster: {cells}"]

"""F, C and U, window by window: why a run was stopped."""

import math
from collections.abc import Sequence

from poprisk_integrations.cli.report.chart import Chart, Line
from poprisk_integrations.cli.report.curve import Curve, changes
from poprisk_integrations.cli.report.plain_text import number
from poprisk_integrations.cli.report.quantity_chart import marks_of, run_name
from poprisk_integrations.cli.report.run import Run
from poprisk_integrations.cli.report.stop_file import middle_step

__all__ = ["STOP_BASES", "stop_charts"]

_TITLES = {
    "signal_ratio": "How far batches agree (F)",
    "risk_decrease": "Gain of the last step (C)",
    "agreement": "Agreement of consecutive batches (U)",
}
_NOTES = {
    "signal_ratio": "One point per window, at its middle. At 1 the batches agree on a direction as "
    "far as chance alone would have them; only below the threshold is nothing left in common.",
    "risk_decrease": "First-order gain of repeating the last step on fresh batches.",
    "agreement": "Product of consecutive gradients; near 0 they agree no more than noise does.",
}
STOP_BASES = frozenset(
    {f"poprisk/{name}{end}" for name in _TITLES for end in ("", "_se")}
    | {"poprisk/onset_step", "poprisk/predicted_stop_step"}
)


def stop_charts(runs: Sequence[Run]) -> list[Chart]:
    """The charts of the stop's section."""
    charts = []
    for name, title in _TITLES.items():
        lines = [
            line for index in range(len(runs)) for line in _lines(runs, index, name, len(runs) > 1)
        ]
        if not lines:
            continue
        level = (0.0, "zero") if name != "signal_ratio" else _threshold(runs)
        charts.append(
            Chart(
                title=title,
                lines=lines,
                marks=marks_of(runs),
                level=level,
                log=name == "signal_ratio",
                note=f"{_NOTES[name]} The band is one standard error.",
                num_runs=len(runs),
            )
        )
    return charts


def _threshold(runs: Sequence[Run]) -> tuple[float, str] | None:
    found = {run.stop.threshold for run in runs if run.stop is not None} or {1.0}
    return (found.pop(), "threshold") if len(found) == 1 else None


def _lines(runs: Sequence[Run], index: int, name: str, is_compared: bool) -> list[Line]:
    """From the report where there is one; loggers repeat values and round them."""
    run = runs[index]
    rows = run.stop.history if run.stop is not None else []
    values = {middle_step(row): number(row.get(name)) for row in rows}
    points = {step: value for step, value in values.items() if value is not None}
    errors = {middle_step(row): number(row.get(f"{name}_se")) or 0.0 for row in rows}
    if points:
        of = {"": (Curve.of(points), errors)}
    else:
        of = {}
        for key, curve in run.family(f"poprisk/{name}"):
            if key.split == "train" and curve.finite().values:
                curve = changes(curve.finite())
                of[key.group] = (curve, _logged_errors(run, name, key.group))
    lines = []
    for style, (group, (curve, errors)) in enumerate(of.items()):
        what = f"callback {group}" if group else ("" if is_compared else "F, C, U"[_place(name)])
        ends = [(v - errors.get(s, 0.0), v + errors.get(s, 0.0)) for s, v in _pairs(curve)]
        lines.append(
            Line(
                what=what,
                run_name=run_name(runs, index),
                curve=curve,
                run=index,
                style=style,
                low=[
                    _positive(low, v, name) for (low, _), v in zip(ends, curve.values, strict=True)
                ],
                high=[high for _, high in ends],
            )
        )
    return lines


def _place(name: str) -> int:
    return 3 * list(_TITLES).index(name)


def _pairs(curve: Curve) -> list[tuple[float, float]]:
    return list(zip(curve.steps, curve.values, strict=True))


def _positive(low: float, value: float, name: str) -> float:
    """F cannot be negative, and its axis may be logarithmic."""
    return max(low, min(value, 1e-3)) if name == "signal_ratio" else low


def _logged_errors(run: Run, name: str, group: str) -> dict[float, float]:
    for key, curve in run.family(f"poprisk/{name}_se"):
        if key.split == "train" and key.group == group:
            return {s: v for s, v in _pairs(curve) if math.isfinite(v)}
    return {}

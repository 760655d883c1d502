"""What the gate did, in total and by parameter group."""

from collections.abc import Sequence
from typing import Any

from poprisk_integrations.cli.report.chart import Chart, Line, Mark
from poprisk_integrations.cli.report.curve import Curve
from poprisk_integrations.cli.report.key_names import natural
from poprisk_integrations.cli.report.plain_text import plain, short, shown
from poprisk_integrations.cli.report.quantity_chart import group_charts, marks_of, quantity_chart
from poprisk_integrations.cli.report.run import Run

__all__ = ["GATE_BASES", "gate_charts", "group_table"]

_SHARE = (0.0, 1.0)
_QUANTITIES: dict[str, tuple[str, dict[str, Any]]] = {
    "open_fraction": ("Open fraction", {"bounds": _SHARE}),
    "mean_gate": ("Mean gate", {"bounds": _SHARE}),
    "update_norm_ratio": ("Update norm, gated / ungated", {"bounds": _SHARE}),
    "effective_lr": ("Effective learning rate", {"note": "Learning rate times the norm ratio."}),
}
_CLOSED = {"closed_noise": "noise", "closed_zero_grad": "zero gradient"}
GATE_BASES = frozenset(f"poprisk/{name}" for name in (*_QUANTITIES, *_CLOSED))
_MOST_STACKED = 4  # groups with areas of their own, where there is no total


def gate_charts(runs: Sequence[Run]) -> list[Chart]:
    """The charts of the gate's section."""
    charts = []
    for name, (title, options) in _QUANTITIES.items():
        charts += quantity_chart(runs, title, {f"poprisk/{name}": ""}, **options)
    for index in range(len(runs)):
        charts += _closed(runs, index)
    for name, (title, options) in list(_QUANTITIES.items())[:3]:
        charts += group_charts(runs, title, f"poprisk/{name}", **options)
    return charts


def _closed(runs: Sequence[Run], index: int) -> list[Chart]:
    """Shares of closed coordinates by reason, stacked; of groups only where there is no total."""
    run = runs[index]
    by_group: dict[str, dict[str, Curve]] = {}
    for name in _CLOSED:
        for key, curve in run.family(f"poprisk/{name}"):
            if key.split == "train" and curve.finite().values:
                by_group.setdefault(key.group, {})[name] = curve.finite()
    groups = [""] if "" in by_group else sorted(by_group, key=natural)[:_MOST_STACKED]
    marks = [Mark(kind=m.kind, step=m.step) for m in marks_of(runs) if m.run == index]
    charts = []
    for group in groups:
        curves = by_group[group]
        steps = sorted(set.intersection(*(set(curve.steps) for curve in curves.values())))
        if not steps:
            continue
        lines = []
        for style, (name, curve) in enumerate(curves.items()):
            points = dict(zip(curve.steps, curve.values, strict=True))
            values = tuple(points[step] for step in steps)
            lines.append(Line(what=_CLOSED[name], curve=Curve(tuple(steps), values), style=style))
        parts = [plain(group), short(run.name) if len(runs) > 1 else ""]
        charts.append(
            Chart(
                title=", ".join(["Why coordinates are closed", *(part for part in parts if part)]),
                lines=lines,
                marks=marks,
                bounds=_SHARE,
                stacked=True,
                note="Shares of all coordinates; what is left above the areas is open.",
            )
        )
    return charts


def group_table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]] | None:
    """Last values by parameter group; None where nothing was logged by group."""
    names = [*_QUANTITIES, *_CLOSED]
    rows = []
    for run in runs:
        last: dict[str, dict[str, float | None]] = {}
        for name in names:
            for key, curve in run.family(f"poprisk/{name}"):
                if key.group and key.split == "train":
                    last.setdefault(key.group, {})[name] = curve.last()
        for group in sorted(last, key=natural):
            first = [run.name] if len(runs) > 1 else []
            rows.append([*first, plain(group), *(shown(last[group].get(name)) for name in names)])
    if not rows:
        return None
    run_column = ["run"] if len(runs) > 1 else []
    return [*run_column, "group", *(name.replace("_", " ") for name in names)], rows

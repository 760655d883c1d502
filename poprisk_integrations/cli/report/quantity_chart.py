"""Charts of logged quantities, of one run or of several."""

from collections.abc import Sequence
from typing import Any

from poprisk_integrations.cli.report.chart import Chart, Line, Mark
from poprisk_integrations.cli.report.curve import Curve
from poprisk_integrations.cli.report.key_names import Key, natural
from poprisk_integrations.cli.report.plain_text import plain, short
from poprisk_integrations.cli.report.run import Run

__all__ = ["group_charts", "marks_of", "quantity_chart", "run_name"]

_MOST_GROUPS = 6  # lines that can still be told apart


def marks_of(runs: Sequence[Run]) -> list[Mark]:
    """When memorising began and training stopped; where it has not, when it would."""
    marks = []
    for index, run in enumerate(runs):
        onset = run.last("poprisk/onset_step") if run.stop is None else run.stop.onset_at
        stop = None if run.stop is None else run.stop.stop_step
        ahead = run.last("poprisk/predicted_stop_step")
        if onset is not None:
            marks.append(Mark(kind="onset", step=onset, run=index))
        if stop is not None:
            marks.append(Mark(kind="stop", step=stop, run=index))
        elif onset is not None and ahead is not None:
            marks.append(Mark(kind="predicted stop", step=ahead, run=index))
    return marks


def run_name(runs: Sequence[Run], index: int) -> str:
    """Short enough for a legend; "" where there is one run."""
    return short(runs[index].name) if len(runs) > 1 else ""


def quantity_chart(
    runs: Sequence[Run],
    title: str,
    bases: dict[str, str],
    *,
    band: tuple[str, str] | None = None,
    always_name: bool = False,
    **options: Any,
) -> list[Chart]:
    """One chart of quantities over all parameters; none where no run has them.

    Args:
        runs: Of the page.
        title: Heading.
        bases: Quantity, see `Key.base` -> its name in the legend, "" if it is the only one.
        band: Quantities that are the ends of a band.
        always_name: Whether a split is named even where it is the only one.
        options: Of `Chart` and, for `steps_hold`, of `Line`.
    """
    found = [
        (index, base, key, curve)
        for index, run in enumerate(runs)
        for base in bases
        for key, curve in run.family(base)
        if not key.group and curve.finite().values
    ]
    hold = options.pop("steps_hold", False)
    splits = {key.split for _, _, key, _ in found} | ({"always"} if always_name else set())
    whats = list(dict.fromkeys(_what(bases[base], key, len(splits)) for _, base, key, _ in found))
    lines = []
    for index, base, key, curve in found:
        what = _what(bases[base], key, len(splits))
        low, high = _ends(runs[index], key, curve, band)
        lines.append(
            Line(
                what=what if len(whats) > 1 or len(runs) == 1 else "",
                run_name=run_name(runs, index),
                curve=curve,
                run=index,
                style=whats.index(what),
                low=low,
                high=high,
                steps_hold=hold,
            )
        )
    if not lines:
        return []
    options = {"num_runs": len(runs), "marks": marks_of(runs), **options}
    return [Chart(title=title, lines=lines, **options)]


def _what(name: str, key: Key, num_splits: int) -> str:
    split = key.split if num_splits > 1 or not name else ""
    kind = f"({key.kind})" if key.kind else ""
    return " ".join(part for part in (split, name, kind) if part)


def _ends(
    run: Run, key: Key, curve: Curve, band: tuple[str, str] | None
) -> tuple[list[float] | None, list[float] | None]:
    if band is None:
        return None, None
    ends = []
    for base in band:
        points: dict[float, float] = {}
        for other, values in run.family(base):
            if (other.split, other.group) == (key.split, key.group):
                points = dict(zip(values.steps, values.values, strict=True))
        ends.append([points.get(step, float("nan")) for step in curve.steps])
    return ends[0], ends[1]


def group_charts(runs: Sequence[Run], title: str, base: str, **options: Any) -> list[Chart]:
    """A quantity by parameter group, one chart for each run that has it.

    Of many groups a few are drawn, evenly spaced in their order; all are in the page's table.
    """
    charts = []
    for index, run in enumerate(runs):
        groups = {key.group: curve for key, curve in run.family(base) if key.group}
        groups = {name: curve for name, curve in groups.items() if curve.finite().values}
        if not groups:
            continue
        names = sorted(groups, key=natural)
        last = len(names) - 1
        count = min(len(names), _MOST_GROUPS)
        drawn = [names[round(i * last / max(count - 1, 1))] for i in range(count)]
        note = f"{count} of {len(names)} groups; the table has all." if last >= count else ""
        lines = [
            Line(what=short(plain(name)), curve=groups[name], style=style)
            for style, name in enumerate(drawn)
        ]
        of = f", {short(run.name)}" if len(runs) > 1 else ""
        marks = [Mark(kind=m.kind, step=m.step) for m in marks_of(runs) if m.run == index]
        heading = f"{title} by parameter group{of}"
        charts.append(Chart(title=heading, lines=lines, marks=marks, note=note, **options))
    return charts

"""What a chart shows, without a word on how it is drawn; and the same as text and as a table."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from poprisk_integrations.cli.report.curve import Curve, thinned
from poprisk_integrations.cli.report.plain_text import shown

__all__ = ["Chart", "Line", "Mark", "describe", "table_of"]

_TABLE_POINTS = 24  # of each line


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line, or one area of a stacked chart.

    Attributes:
        what: The quantity, as "eval" or "p10"; may be "" where there is one.
        curve: Its points.
        run_name: Of its run; "" where there is one run.
        run: Index of the run, which gives the colour where there are several runs.
        style: Index of the dash pattern; and of the colour where there is one run.
        low: Lower end of a band around it, one per point; None for no band.
        high: Upper end.
        steps_hold: Whether a value holds until the next point.
    """

    what: str
    curve: Curve
    run_name: str = ""
    run: int = 0
    style: int = 0
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    steps_hold: bool = False

    @property
    def label(self) -> str:
        """Both names."""
        return ", ".join(part for part in (self.run_name, self.what) if part)


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """A step at which something happened: "onset", "stop" or "predicted stop"."""

    kind: str
    step: float
    run: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """One chart over optimizer steps.

    Attributes:
        title: Heading.
        lines: At least one.
        marks: Vertical lines.
        level: A horizontal line, and its label.
        bounds: Of the vertical axis; None for the data's own.
        log: Whether the vertical axis may be logarithmic.
        stacked: Whether the lines are areas on top of each other.
        note: A sentence below it.
        num_runs: Of the page.
        last_step: Where the horizontal axis ends, the same for all charts of a page; 0 for the
            lines' own end.
    """

    title: str
    lines: Sequence[Line]
    marks: Sequence[Mark] = field(default=())
    level: tuple[float, str] | None = None
    bounds: tuple[float, float] | None = None
    log: bool = False
    stacked: bool = False
    note: str = ""
    num_runs: int = 1
    last_step: float = 0.0


def describe(chart: Chart) -> str:
    """The chart in words, for whoever does not see it.

    Example:
        >>> line = Line(what="train", curve=Curve((1, 5), (2.0, 0.5)))
        >>> describe(Chart(title="Loss", lines=[line]))
        'Line chart over optimizer steps. train: 2 points, from 2 at step 1 to 0.5 at step 5.'
    """
    kind = "Stacked areas" if chart.stacked else "Line chart"
    parts = [f"{kind} over optimizer steps."]
    parts += [_describe_line(line) for line in chart.lines]
    if chart.level is not None:
        parts.append(f"Horizontal line: {chart.level[1]} at {shown(chart.level[0])}.")
    for mark in chart.marks:
        of = f" of run {mark.run + 1}" if chart.num_runs > 1 else ""
        parts.append(f"{mark.kind.capitalize()}{of} at step {shown(mark.step)}.")
    return " ".join(parts)


def _describe_line(line: Line) -> str:
    curve = line.curve.finite()
    if not curve.values:
        return f"{line.label}: no finite value."
    ends = (
        f"from {shown(curve.values[0])} at step {shown(curve.steps[0])} to "
        f"{shown(curve.values[-1])} at step {shown(curve.steps[-1])}"
    )
    if len(curve.values) == 1:
        return f"{line.label}: {shown(curve.values[0])} at step {shown(curve.steps[0])}."
    text = f"{line.label}: {len(curve.values)} points, {ends}"
    for word, pick in (("lowest", min), ("highest", max)):
        value = pick(curve.values)
        if value not in (curve.values[0], curve.values[-1]):
            step = curve.steps[curve.values.index(value)]
            text += f", {word} {shown(value)} at step {shown(step)}"
    missing = len(line.curve.values) - len(curve.values)
    return f"{text}, {missing} not finite." if missing else f"{text}."


def table_of(chart: Chart) -> tuple[list[str], list[list[str]], bool]:
    """The chart's numbers.

    Returns:
        Column names, rows, and whether points were left out.
    """
    columns = ["step"]
    cells: list[dict[float, float]] = []
    steps: set[float] = set()
    is_thinned = False
    for line in chart.lines:
        points = dict(zip(line.curve.steps, line.curve.values, strict=True))
        kept = thinned(line.curve, _TABLE_POINTS)
        is_thinned |= len(kept) < len(points)
        steps |= {line.curve.steps[index] for index in kept}
        columns.append(line.label)
        cells.append(points)
        for name, ends in (("low", line.low), ("high", line.high)):
            if ends is not None:
                columns.append(f"{line.label}, {name}")
                cells.append(dict(zip(line.curve.steps, ends, strict=True)))
    rows = [
        [shown(step, 9), *(shown(points.get(step), 5) for points in cells)]
        for step in sorted(steps)
    ]
    return columns, rows, is_thinned

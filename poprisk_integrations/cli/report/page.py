"""What is written of runs: the page in one file, pictures of its charts, and JSON."""

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from poprisk_integrations import __version__
from poprisk_integrations.cli.output import writing
from poprisk_integrations.cli.report.charts import Chart, Line, Section, sections_of
from poprisk_integrations.cli.report.draw import (
    DARK,
    LIGHT,
    draw_charts,
    drawing,
    svg_of,
    thinned,
)
from poprisk_integrations.cli.report.findings import answers, headline, key_figures, sentences
from poprisk_integrations.cli.report.labels import labels_of
from poprisk_integrations.cli.report.run import NOTHING, Run, finite, natural, plain, shown

__all__ = ["SCRIPT", "STYLE", "as_json", "page_of", "stop_charts", "write_page", "write_stops"]

_HERE = Path(__file__).parent
_OF_GROUPS = (
    "open_fraction", "mean_gate", "update_norm_ratio", "effective_lr", "closed_noise",
    "closed_zero_grad",
)  # fmt: skip
_TABLE_POINTS = 24  # of each line
Table = tuple[str, list[str], list[list[str]]]  # caption, columns, rows


def _variables(colours: dict[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in colours.items())


STYLE = f"""
:root{{color-scheme:light;{_variables(LIGHT)}}}
@media (prefers-color-scheme:dark){{
:root:not([data-theme=light]){{color-scheme:dark;{_variables(DARK)}}}}}
:root[data-theme=dark]{{color-scheme:dark;{_variables(DARK)}}}
""" + (_HERE / "page.css").read_text(encoding="utf-8")
SCRIPT = (_HERE / "page.js").read_text(encoding="utf-8")


def _prose(text: str) -> Markup:
    """A sentence with what it has in backticks as code, and no line end between value and error."""
    parts = text.replace(" +- ", "\u00a0\u00b1\u00a0").split("`")
    if len(parts) % 2 == 0:  # one that stands alone
        return escape("`".join(parts))
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if index % 2 else part
        for index, part in enumerate(parts)
    )


_ENVIRONMENT = Environment(
    loader=FileSystemLoader(_HERE),
    autoescape=True,
    trim_blocks=True,
    undefined=StrictUndefined,
    keep_trailing_newline=True,
)
_ENVIRONMENT.filters["prose"] = _prose
_TEMPLATE = _ENVIRONMENT.get_template("page.html.j2")


def stop_charts(run: Run) -> Sequence[Chart]:
    """What the windows of a report say: the estimated test loss, or F, C and U."""
    if run.report is None or run.stop is None or run.stop.windows.empty:
        return ()
    name = "risk" if run.stop.criterion == "risk" else "stop"
    return next(section.charts for section in sections_of([run]) if section.name == name)


def write_stops(runs: Sequence[Run], out: Path | None) -> list[Path]:
    """One picture for each report of a stop: beside the report, or beside `out`."""
    written = []
    for number, run in enumerate(runs, start=1):
        charts = stop_charts(run)
        if not charts or run.report_path is None or run.stop is None:
            continue
        path = run.report_path.with_suffix(".png")
        if out is not None:
            ending = f"_stop_{number}.png" if len(runs) > 1 else "_stop.png"
            path = out if out.suffix == ".png" else out.with_name(f"{out.stem}{ending}")
        title = f"{run.report_path.parent}\n{run.stop.verdict}"
        written.append(_write_png(path, charts, title, columns=1))
    return written


def write_page(runs: Sequence[Run], path: Path) -> list[Path]:
    """The page, and beside it a PNG of its charts, if it has any."""
    sections = sections_of(runs)
    text = page_of(runs, sections)
    charts = [chart for section in sections for chart in section.charts]
    names = ", ".join(run.name for run in runs)
    pictures = [_write_png(path.with_suffix(".png"), charts, names)] if charts else []
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return pictures


def _write_png(path: Path, charts: Sequence[Chart], title: str, columns: int = 3) -> Path:
    with drawing(), writing(path) as temporary:
        draw_charts(charts, title, columns).savefig(temporary, format="png")
    return path


def as_json(runs: Sequence[Run], page: Path | None, pictures: Sequence[Path]) -> dict[str, Any]:
    """Of one run its `poprisk_stop.json`, and more; of several the same under "runs"."""
    figures = key_figures(runs)
    parts = [
        {
            **(run.report or {}),
            "run": str(run.directory),
            "headline": headline(run),
            "answers": answers(run),
            "sentences": sentences(run),
            "figures": {row[0]: row[index] for row in figures},
        }
        for index, run in enumerate(runs, start=1)
    ]
    written = {"page": None if page is None else str(page), "pictures": [str(p) for p in pictures]}
    whole = {**parts[0], **written} if len(runs) == 1 else {"runs": parts, **written}
    found: dict[str, Any] = json.loads(json.dumps(whole), parse_constant=lambda _: None)  # no NaN
    return found


def page_of(runs: Sequence[Run], sections: Sequence[Section]) -> str:
    """The whole page: it loads nothing, and runs its one script, whatever text a log holds."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    names = [run.name for run in runs]
    groups, labels = _groups(runs), labels_of(runs)
    filled = {"gate": groups, "labels": labels}  # also without a chart
    return _TEMPLATE.render(
        policy=f"default-src 'none'; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        style=Markup(STYLE),
        script=Markup(SCRIPT),
        names=names,
        answers=list(map(answers, runs)),
        sentences=list(map(sentences, runs)),
        figures=key_figures(runs),
        sections=[s for s in sections if s.charts or s.remarks or filled.get(s.name)],
        draw=_figure,
        groups=groups,
        labels=labels,
        settings=[
            _compared("Settings", runs, [run.settings for run in runs]),
            _compared("Versions", runs, [run.versions for run in runs]),
        ],
        files=[
            [_shown_path(path, run), f"{path.stat().st_size:,} bytes", run.name]
            for run in runs
            for path in run.files
        ],
        version=__version__,
        places=", ".join(plain(run.directory) for run in runs),
    )


def _figure(chart: Chart, name: str) -> dict[str, Any]:
    """A chart with its numbers: of many points some."""
    kept = [thinned(line.curve, _TABLE_POINTS) for line in chart.lines]
    is_thinned = any(len(line.curve) > _TABLE_POINTS for line in chart.lines)
    columns = [
        (f"{chart.label(line)}{end}", curve)
        for line in chart.lines
        for end, curve in (("", line.curve), (", low", line.low), (", high", line.high))
        if curve is not None
    ]
    steps = sorted({step for curve in kept for step in curve.index})
    rows = [[shown(step, 9), *(shown(c.get(step), 5) for _, c in columns)] for step in steps]
    caption = f"{chart.of.title}: {'some points' if is_thinned else 'all points'}"
    return {
        "title": chart.of.title,
        "svg": Markup(svg_of(chart, name, _described(chart))),
        "note": chart.of.note,
        "numbers": (caption, ["step", *(label for label, _ in columns)], rows),
    }


def _described(chart: Chart) -> str:
    """The chart in words, for whoever does not see it."""
    kind = "Stacked areas" if chart.of.stacked else "Line chart"
    parts = [f"{kind} over optimizer steps."]
    parts += [f"{chart.label(line)}: {_line_in_words(line)}." for line in chart.lines]
    if chart.level is not None:
        parts.append(f"Horizontal line: {chart.level[1]} at {shown(chart.level[0])}.")
    for kind, step, run in chart.marks:
        of = f" of run {run + 1}" if chart.is_compared else ""
        parts.append(f"{kind.capitalize()}{of} at step {shown(step)}.")
    return " ".join(parts)


def _line_in_words(line: Line) -> str:
    curve = finite(line.curve)
    if curve.empty:
        return "no finite value"
    first, last = (f"{shown(curve.iloc[i])} at step {shown(curve.index[i])}" for i in (0, -1))
    if len(curve) == 1:
        return first
    text = f"{len(curve)} points, from {first} to {last}"
    for word, step in (("lowest", curve.idxmin()), ("highest", curve.idxmax())):
        if curve[step] not in (curve.iloc[0], curve.iloc[-1]):
            text += f", {word} {shown(curve[step])} at step {shown(step)}"
    missing = len(line.curve) - len(curve)
    return f"{text}, {missing} not finite" if missing else text


def _groups(runs: Sequence[Run]) -> Table | None:
    """Last values of the gate by parameter group; None where nothing was logged by group."""
    rows = []
    for run in runs:
        found = [key for name in _OF_GROUPS for key, _ in run.family(f"poprisk/{name}")]
        groups = {key.group for key in found if key.group and key.split == "train"}
        for group in sorted(groups, key=natural):
            curves = [run.curve(f"poprisk/{name}", group=group) for name in _OF_GROUPS]
            values = [shown(curve.iloc[-1] if curve.size else None) for curve in curves]
            rows.append([run.name, plain(group), *values])
    columns = ["run", "group", *(name.replace("_", " ") for name in _OF_GROUPS)]
    if len(runs) == 1:
        columns, rows = columns[1:], [row[1:] for row in rows]
    return ("Last values by group", columns, rows) if rows else None


def _compared(heading: str, runs: Sequence[Run], values: Sequence[dict[str, str]]) -> Table:
    """Settings or versions of all runs, with whether they are the same."""
    rows = []
    for name in sorted({name for one in values for name in one}):
        row = [one.get(name, NOTHING) for one in values]
        same = ["yes" if len(set(row)) == 1 else "differs"] if len(values) > 1 else []
        rows.append([name, *row, *same])
    columns = ["name", *(run.name for run in runs), *(["same"] if len(runs) > 1 else [])]
    return heading, columns, rows


def _shown_path(path: Path, run: Run) -> str:
    is_inside = path.is_relative_to(run.directory)
    return plain(path.relative_to(run.directory) if is_inside else path)

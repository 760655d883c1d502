"""The page: sections, charts and tables of one run or of several."""

from collections.abc import Sequence
from pathlib import Path
from xml.etree.ElementTree import Element

from poprisk_integrations import __version__
from poprisk_integrations.cli.report.chart import Chart, describe, table_of
from poprisk_integrations.cli.report.draw import draw_chart, drawing
from poprisk_integrations.cli.report.findings import headline, key_figures, sentences
from poprisk_integrations.cli.report.gate_charts import group_table
from poprisk_integrations.cli.report.html_tree import details, serialized, table, tag
from poprisk_integrations.cli.report.label_section import label_tables
from poprisk_integrations.cli.report.page_style import CONTENT_POLICY, SCRIPT, STYLE
from poprisk_integrations.cli.report.plain_text import NOTHING, plain
from poprisk_integrations.cli.report.run import Run
from poprisk_integrations.cli.report.sections import Section
from poprisk_integrations.cli.report.svg import svg_element

__all__ = ["page_of"]


def page_of(runs: Sequence[Run], sections: Sequence[Section]) -> str:
    """The whole page.

    Args:
        runs: At least one.
        sections: Of charts, in order.
    """
    names = " and ".join(run.name for run in runs) if len(runs) < 3 else f"{len(runs)} runs"
    title = f"Training report: {names}"
    parts = [("summary", "What happened", _summary(runs))]
    number = 0
    for section in sections:
        content = [tag("p", section.intro)] if section.intro else []
        figures = []
        for chart in section.charts:
            number += 1
            figures.append(_figure(chart, f"c{number}"))
        content += [tag("div", *figures, class_="charts")] if figures else []
        content += [tag("p", text) for text in section.remarks]
        content += _tables(runs, section.name)
        if content:
            parts.append((section.name, section.title, content))
    parts.append(("settings", "Settings and versions", _settings(runs)))
    main = [
        tag("section", tag("h2", heading, id=f"{name}-head"), *content, id=name,
            aria_labelledby=f"{name}-head")
        for name, heading, content in parts
    ]  # fmt: skip
    links = [tag("li", tag("a", heading, href=f"#{name}")) for name, heading, _ in parts]
    button = tag("button", "Dark colours", id="theme", type="button", hidden="hidden")
    nav = tag("nav", tag("ul", *links), aria_label="Sections")
    html = tag(
        "html",
        _head(title),
        tag(
            "body",
            tag("a", "Skip to the report", class_="skip", href="#main"),
            tag("header", tag("h1", title), button, nav),
            tag("main", *main, id="main", tabindex="-1"),
            _footer(runs),
            tag("script", SCRIPT),
        ),
        lang="en",
    )
    return f"<!DOCTYPE html>\n{serialized(html)}\n"


def _head(title: str) -> Element:
    policy = {"http-equiv": "Content-Security-Policy", "content": CONTENT_POLICY}
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", **policy),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", STYLE),
    )


def _summary(runs: Sequence[Run]) -> list[Element]:
    content = []
    for run in runs:
        heading = [tag("h3", run.name)] if len(runs) > 1 else []
        lines = tag("ul", *(tag("li", line) for line in sentences(run)))
        top = tag("p", headline(run), class_="headline")
        content.append(tag("div", *heading, top, lines, class_="card"))
    figures = key_figures(runs)
    if len(runs) == 1:
        pairs = [tag("div", tag("dt", name), tag("dd", values[0])) for name, values in figures]
        return [*content, tag("dl", *pairs, class_="figures")]
    rows = [[name, *values] for name, values in figures]
    names = ["last value", *(run.name for run in runs)]
    comparison = tag("div", table("The runs beside each other", names, rows), class_="card")
    return [tag("div", *content, class_="cards"), comparison]


def _figure(chart: Chart, name: str) -> Element:
    with drawing():
        svg = svg_element(draw_chart(chart), name, chart.title, describe(chart))
    columns, rows, is_thinned = table_of(chart)
    caption = f"{chart.title}: {'some points' if is_thinned else 'all points'}"
    note = tag("figcaption", chart.note) if chart.note else None
    data = details("Numbers", table(caption, columns, rows))
    return tag("figure", tag("h3", chart.title), svg, note, data)


def _tables(runs: Sequence[Run], section: str) -> list[Element]:
    if section == "labels":
        return label_tables(runs)
    if section == "gate":
        found = group_table(runs)
        if found is not None:
            return [details(f"All {len(found[1])} groups", table("Last values by group", *found))]
    return []


def _settings(runs: Sequence[Run]) -> list[Element]:
    content = []
    for heading, values in (
        ("Settings", [run.settings for run in runs]),
        ("Versions", [run.versions for run in runs]),
    ):
        names = sorted({name for one in values for name in one})
        if not names:
            content.append(tag("p", f"{heading}: none in the run's text files."))
            continue
        columns = ["name", *(run.name for run in runs)]
        rows = [[name, *(one.get(name, NOTHING) for one in values)] for name in names]
        if len(runs) > 1:
            columns.append("same")
            rows = [[*row, "yes" if len(set(row[1:])) == 1 else "differs"] for row in rows]
        element = table(f"{heading} found in text files", columns, rows)
        content.append(details(f"{heading} ({len(names)})", element, is_open=len(names) <= 16))
    rows = [
        [_relative(path, run), f"{path.stat().st_size:,} bytes", run.name]
        for run in runs
        for path in run.files
    ]
    element = table("Files that were read", ["file", "size", "run"], rows)
    return [*content, details(f"Files ({len(rows)})", element)]


def _relative(path: Path, run: Run) -> str:
    is_inside = path.is_relative_to(run.directory)
    return plain(path.relative_to(run.directory) if is_inside else path)


def _footer(runs: Sequence[Run]) -> Element:
    places = ", ".join(plain(run.directory) for run in runs)
    return tag(
        "footer",
        tag("p", f"Made by poprisk_integrations {__version__} from {places}. Curves of more than "
            "800 points are thinned; their minima and maxima are kept."),
    )  # fmt: skip

"""How the margins of the pairs are spread, as a picture of the page."""

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from poprisk_integrations.cli.report.html_tree import details, table, tag
from poprisk_integrations.cli.report.plain_text import shown

__all__ = ["margin_histogram"]

_WIDTH, _HEIGHT, _SIDE, _FOOT = 350, 120, 10, 30  # units of the view box
_BINS = 40


def margin_histogram(
    margins: Sequence[float], suspects: Sequence[float], name: str, title: str
) -> Element | None:
    """A figure with the suspect pairs in another colour; None where there are no margins.

    Args:
        margins: Of all pairs that were judged.
        suspects: Of those among them whose label is more probably wrong than right.
        name: An identifier, unique in the page.
        title: Heading.
    """
    if not margins:
        return None
    ordered = sorted(margins)
    tail = len(ordered) // 200  # half a per cent at either end shares the outermost bars
    low, high = ordered[tail], ordered[-1 - tail]
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts = [_binned(values, low, high) for values in (margins, suspects)]
    unit = (_HEIGHT - _FOOT - 10) / max(counts[0])
    width = (_WIDTH - 2 * _SIDE) / _BINS
    bars = [
        tag("rect", x=f"{_SIDE + place * width:.1f}", width=f"{width - 0.6:.1f}",
            y=f"{_HEIGHT - _FOOT - count * unit:.1f}", height=f"{count * unit:.1f}",
            style=f"fill:var(--s{series})")
        for series, found in enumerate(counts)
        for place, count in enumerate(found)
        if count
    ]  # fmt: skip
    labels = [_label(value, low, high) for value in (low, high)]
    if low < 0 < high:
        x = f"{_place(0.0, low, high):.1f}"
        bars.append(tag("line", x1=x, x2=x, y1="4", y2=str(_HEIGHT - _FOOT),
                        style="stroke:var(--muted);stroke-width:1"))  # fmt: skip
        labels.append(_label(0.0, low, high))
    below = sum(value < 0 for value in margins)
    note = (
        f"{len(margins)} pairs, {below} of them with a negative margin: the model would have "
        "ranked them the other way round."
    )
    if suspects:
        note += f" The {len(suspects)} suspect ones are in the second colour."
    picture = tag(
        "svg", tag("title", title, id=f"{name}-title"),
        tag("desc", f"Histogram. {note}", id=f"{name}-desc"), *bars, *labels,
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", tabindex="0", class_="chart",
        aria_labelledby=f"{name}-title", aria_describedby=f"{name}-desc",
    )  # fmt: skip
    step = (high - low) / _BINS
    rows = [
        [shown(low + place * step, 3), str(all_of), str(suspect)]
        for place, (all_of, suspect) in enumerate(zip(*counts, strict=True))
    ]
    numbers = table(f"{title}: all bars", ["margin from", "pairs", "suspect"], rows)
    return tag(
        "figure", tag("h3", title), picture, tag("figcaption", note), details("Numbers", numbers)
    )


def _binned(values: Sequence[float], low: float, high: float) -> list[int]:
    counts = [0] * _BINS
    for value in values:
        counts[min(max(int((value - low) / (high - low) * _BINS), 0), _BINS - 1)] += 1
    return counts


def _place(value: float, low: float, high: float) -> float:
    return _SIDE + (value - low) / (high - low) * (_WIDTH - 2 * _SIDE)


def _label(value: float, low: float, high: float) -> Element:
    anchor = "start" if value == low else "end" if value == high else "middle"
    return tag("text", shown(value, 2), x=f"{_place(value, low, high):.1f}",
               y=str(_HEIGHT - _FOOT + 14), text_anchor=anchor,
               style="fill:var(--muted);font-size:10px")  # fmt: skip

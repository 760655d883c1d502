"""The page's part on wrong labels: margins, groups of pairs, and the most suspect pairs."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from poprisk_integrations.cli.report.cleaning import before_and_after
from poprisk_integrations.cli.report.draw import panel_svg
from poprisk_integrations.cli.report.draw_labels import (
    MOST_GROUPS,
    MarginBars,
    draw_groups,
    draw_margins,
)
from poprisk_integrations.cli.report.findings import label_lines
from poprisk_integrations.cli.report.run import MOST_PAIRS, Run, Suspects, plain, shown

__all__ = ["labels_of"]

_TEXTS = ["prompt", "chosen", "rejected"]
_ROW = 15.0  # points, of a group in a chart
_OF_GROUPS = {
    "annotator": (
        "Suspect labels by annotator",
        "Annotators in the order of the lower ends, the worst first; in brackets their judged "
        "pairs. P(wrong) starts from one rate for all, so an annotator is further from the mean "
        "than the dots say.",
    ),
    "length": (
        "Suspect labels by length",
        "Thirds of the pairs by the length of chosen minus rejected, in characters; in brackets "
        "judged pairs. Where P(wrong) rises or falls with the length, labels and model weigh "
        "length differently: look at pairs of both ends.",
    ),
}


def labels_of(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What is known of wrong labels, run by run: sentences, charts, and the suspect pairs."""
    found = []
    for index, run in enumerate(runs):
        lines, suspects = label_lines(run), run.suspects
        of = f", {run.name}" if len(runs) > 1 else ""
        one: dict[str, Any] = {"title": f"Wrong labels{of}", "lines": lines}
        one |= {"figures": [], "pairs": None, "cleaned": None}
        if run.cleaning is not None:
            columns = ["", "before", "after"]
            one["cleaned"] = (
                f"Before and after cleaning{of}",
                columns,
                before_and_after(run),
            )
        if suspects is not None and suspects.pairs.size:
            if suspects.pairs["margin"].notna().any():
                one["figures"] = [_margins(run, f"margins{index}", of)]
            one["figures"] += [
                _groups(suspects, kind, f"{kind}{index}", of) for kind in suspects.groups
            ]
            one["pairs"] = _pairs(suspects, of)
        found += [one] if lines else []
    return found


def _pairs(suspects: Suspects, of: str) -> tuple[str, list[str], list[list[str]]]:
    top = suspects.pairs.head(MOST_PAIRS)
    table = pd.DataFrame({"pair": top["pair_id"]})
    if (top["row"] != top["pair_id"]).any():
        table["row"] = top["row"]
    table["probability wrong"] = top["probability_wrong"].map("{:.3f}".format)
    table["margin"] = [shown(None if np.isnan(margin) else margin) for margin in top["margin"]]
    table["action"] = top["action"]
    if suspects.num_swapped is not None:
        table["swapped on purpose"] = np.where(top["swapped"], "yes", "no")
    texts = top[_TEXTS]
    if (texts != "").to_numpy().any():
        table = table.join(texts)
    return f"The {len(top)} most suspect pairs{of}", list(table), table.to_numpy().tolist()


def _margins(run: Run, name: str, of: str) -> dict[str, Any]:
    """How the margins of the pairs are spread, and P(wrong) over them."""
    suspects = run.suspects
    assert suspects is not None
    taken = "before training" if run.cleaning is None else "out of fold"
    pairs = suspects.pairs.dropna(subset="margin")
    by_truth = suspects.num_swapped is not None
    bars = MarginBars.of(pairs, by_truth=by_truth, calibrated=suspects.calibrated)
    negative = int((pairs["margin"] < 0).sum())
    note = (
        f"{len(pairs)} pairs, {negative} of them with a negative margin: the model would have "
        "ranked them the other way round."
    )
    line = " The line is P(wrong) of a pair with this margin"
    note += f"{line}." if suspects.calibrated else f"{line}, which here only ranks the pairs."
    title = f"Margins {taken}{of}"
    points = bars.curve.iloc[np.unique(np.linspace(0, len(bars.curve) - 1, 5).round().astype(int))]
    curve = ", ".join(f"{p:.2f} at {shown(margin, 3)}" for margin, p in points.items())
    kinds = ", ".join(f"{count} {kind}" for kind, count in bars.counts.sum().items())
    described = f"Histogram of {kinds}. {note} P(wrong): {curve}."
    drawn = partial(draw_margins, bars=bars, taken=taken)
    svg = panel_svg(drawn, name, title, described, margins=(46.0, 40.0, 32.0, 34.0))
    counts = bars.counts.astype(str)
    rows = [[shown(at, 3), *kinds] for at, *kinds in counts.itertuples()]
    numbers = f"{title}: all bars", ["margin from", *counts], rows
    return {"title": title, "svg": Markup(svg), "note": note, "numbers": numbers}


def _groups(suspects: Suspects, kind: str, name: str, of: str) -> dict[str, Any]:
    """Mean P(wrong) of some groups of pairs, with intervals."""
    found, (title, note) = suspects.groups[kind], _OF_GROUPS[kind]
    groups = [{**group, "group": plain(group["group"])} for group in found]
    overall = float(suspects.pairs["probability_wrong"].mean())
    if len(groups) > MOST_GROUPS:
        note += f" The first {MOST_GROUPS} of {len(groups)}; the table has all."
    if not suspects.calibrated:
        note += " P(wrong) only ranks the pairs here."
    rows = [
        [
            group["group"],
            str(group["pairs"]),
            str(group["suspects"]),
            f"{group['mean']:.3f}",
            f"{group['low']:.3f} to {group['high']:.3f}",
        ]
        for group in groups
    ]
    said = "; ".join(f"{row[0]}: {row[3]} ({row[4]}), {row[1]} pairs" for row in rows[:MOST_GROUPS])
    described = f"Dots with intervals. Mean P(wrong) of all pairs {overall:.3f}. {said}."
    svg = panel_svg(
        partial(draw_groups, groups=groups, overall=overall),
        name,
        f"{title}{of}",
        described,
        margins=(128.0, 18.0, 10.0, 34.0),
        height=_ROW * (min(len(groups), MOST_GROUPS) + 1),
    )
    columns = [kind, "judged pairs", "suspects", "mean P(wrong)", "95 % interval"]
    numbers = f"{title}{of}: all groups", columns, rows
    return {"title": f"{title}{of}", "svg": Markup(svg), "note": note, "numbers": numbers}

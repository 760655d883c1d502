"""Noise rate and suspect pairs, as paragraphs and a table."""

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from poprisk_integrations.cli.report.html_tree import details, table, tag
from poprisk_integrations.cli.report.labels import Suspects
from poprisk_integrations.cli.report.plain_text import number, plain, shown
from poprisk_integrations.cli.report.run import Run

__all__ = ["label_tables"]


def label_tables(runs: Sequence[Run]) -> list[Element]:
    """What is known of wrong labels, run by run; nothing where nothing is."""
    content: list[Element] = []
    for run in runs:
        lines = [*_noise_lines(run), *(_suspect_lines(run.suspects) if run.suspects else [])]
        if not lines:
            continue
        heading = "Wrong labels" if len(runs) == 1 else f"Wrong labels, {run.name}"
        content.append(
            tag("div", tag("h3", heading), tag("ul", *(tag("li", line) for line in lines)),
                class_="card")
        )  # fmt: skip
        if run.suspects is not None and run.suspects.top:
            content.append(_table(run, run.suspects, len(runs) > 1))
    return content


def _noise_lines(run: Run) -> list[str]:
    noise = run.noise
    if noise is None:
        return []
    rate, low, high = (number(noise.get(name)) for name in ("rate", "low", "high"))
    if rate is None:
        return ["The noise rate was not estimated."]
    text = f"Estimated noise rate {100 * rate:.1f} %"
    if low is not None and high is not None:
        text += f", 95 % interval {100 * low:.1f} to {100 * high:.1f} %"
    pairs, step = number(noise.get("num_pairs")), number(noise.get("estimated_at_step"))
    text += "" if pairs is None else f", from {shown(pairs)} pairs"
    text += "" if step is None else f", at step {shown(step)}"
    lines = [f"{text}."]
    if noise.get("method"):
        lines.append(f"Method: {plain(noise['method'])}.")
    if noise.get("loss"):
        used = number(noise.get("rate_in_use"))
        rate_text = "" if used is None else f", with noise rate {shown(used)}"
        lines.append(f"Loss mode: {plain(noise['loss'])}{rate_text}.")
    return lines


def _suspect_lines(suspects: Suspects) -> list[str]:
    counts = ", ".join(f"{count} {action}" for action, count in suspects.actions.items())
    lines = [
        f"{suspects.num_pairs} pairs, {suspects.num_scored} with a probability; "
        f"{suspects.expected_wrong:.1f} wrong labels expected, {suspects.num_likely} pairs more "
        "probably wrong than right.",
        f"Suggested actions: {counts}.",
    ]
    if suspects.num_swapped is not None:
        lines.append(
            f"{suspects.num_swapped} labels were swapped on purpose; {suspects.likely_swapped} of "
            f"the {suspects.num_likely} pairs that are more probably wrong than right are among "
            "them."
        )
    return lines


def _table(run: Run, suspects: Suspects, is_compared: bool) -> Element:
    columns = ["pair", "probability wrong", "margin", "action"]
    rows = [[p.pair_id, f"{p.probability:.3f}", shown(p.margin), p.action] for p in suspects.top]
    if suspects.num_swapped is not None:
        columns.append("swapped on purpose")
        rows = [
            [*row, "yes" if pair.swapped else "no"]
            for row, pair in zip(rows, suspects.top, strict=True)
        ]
    name = f"The {len(rows)} most suspect pairs" + (f", {run.name}" if is_compared else "")
    return details(name, table(name, columns, rows), is_open=not is_compared)

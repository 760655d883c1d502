"""Noise rate and suspect pairs, as paragraphs and a table."""

import shlex
from collections.abc import Sequence
from xml.etree.ElementTree import Element

from poprisk_integrations.cli.report.html_tree import details, table, tag
from poprisk_integrations.cli.report.labels import Suspects
from poprisk_integrations.cli.report.margin_histogram import margin_histogram
from poprisk_integrations.cli.report.plain_text import number, plain, shown
from poprisk_integrations.cli.report.run import Run

__all__ = ["label_tables"]


def label_tables(runs: Sequence[Run]) -> list[Element]:
    """What is known of wrong labels, run by run; nothing where nothing is."""
    content: list[Element] = []
    for index, run in enumerate(runs):
        lines = [*_noise_lines(run), *(_suspect_lines(run, run.suspects) if run.suspects else [])]
        if not lines:
            continue
        heading = "Wrong labels" if len(runs) == 1 else f"Wrong labels, {run.name}"
        content.append(
            tag("div", tag("h3", heading), tag("ul", *(tag("li", line) for line in lines)),
                class_="card")
        )  # fmt: skip
        if run.suspects is not None and run.suspects.top:
            margins = run.suspects.margins
            likely = margins[: run.suspects.num_likely]
            title = "Margins before training"
            title += "" if len(runs) == 1 else f", {run.name}"
            picture = margin_histogram(margins, likely, f"margins{index}", title)
            content += [] if picture is None else [tag("div", picture, class_="charts")]
            content.append(_table(run, run.suspects, len(runs) > 1))
    return content


def _noise_lines(run: Run) -> list[str]:
    noise = run.noise
    if noise is None:
        return []
    rate, low, high = (number(noise.get(name)) for name in ("rate", "low", "high"))
    if rate is None and high is None:
        return ["The noise rate was not estimated."]
    if rate is None:
        text = "The margins do not tell how many labels are wrong: "
        text += f"{100 * (low or 0.0):.1f} to {100 * (high or 0.0):.1f} %"
    else:
        text = f"Estimated noise rate {100 * rate:.1f} %"
        if low is not None and high is not None:
            text += f", 95 % interval {100 * low:.1f} to {100 * high:.1f} %"
    pairs, step = number(noise.get("num_pairs")), number(noise.get("estimated_at_step"))
    text += "" if pairs is None else f", from {shown(pairs)} pairs"
    text += "" if step is None else f", at step {shown(step)}"
    lines = [f"{text}."]
    if noise.get("method"):
        lines.append(f"Method: {plain(noise['method'])}.")
    loss = noise.get("loss")
    if loss:
        used = number(noise.get("rate_in_use")) if loss in ("cdpo", "rdpo", "weights") else None
        rate_text = "" if used is None else f", with noise rate {shown(used)}"
        if used is not None and rate is not None and used < rate:
            rate_text += " (no larger one is used: too large a rate does more harm than too small)"
        lines.append(f"Loss mode: {plain(loss)}{rate_text}.")
    return lines


def _suspect_lines(run: Run, suspects: Suspects) -> list[str]:
    counts = ", ".join(f"{count} {action}" for action, count in suspects.actions.items())
    found = f"{suspects.num_pairs} pairs, {suspects.num_scored} of them judged"
    clean = f"poprisk flips {shlex.quote(str(run.directory))} --dataset DATA --write clean.jsonl"
    if suspects.calibrated:
        lines = [
            f"{found}; {suspects.expected_wrong:.0f} wrong labels expected, {suspects.num_likely} "
            "pairs more probably wrong than right.",
            f"Suggested actions: {counts}.",
            "What to do next: look at the pairs below. If they are wrong, leave out the surest: "
            f"{clean} --min-probability 0.9",
        ]
    else:
        lines = [
            f"{found}; they are ranked by their margins. How many are wrong is not known, so the "
            "column 'probability wrong' is a ranking and no probability.",
            f"Suggested actions: {counts}.",
            "What to do next: look at the pairs below before anything is changed. Margins out of "
            "fold (cross_fit_flip_report) judge better; some hundred pairs labelled twice tell "
            "the rate (double_annotation_rate).",
        ]
    if suspects.num_swapped is not None:
        lines.append(
            f"{suspects.num_swapped} labels were swapped on purpose"
            + (
                f"; {suspects.likely_swapped} of the {suspects.num_likely} pairs that are more "
                "probably wrong than right are among them."
                if suspects.calibrated
                else "."
            )
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
    if any(any(pair.texts) for pair in suspects.top):
        columns += ["prompt", "chosen", "rejected"]
        rows = [[*row, *pair.texts] for row, pair in zip(rows, suspects.top, strict=True)]
    name = f"The {len(rows)} most suspect pairs" + (f", {run.name}" if is_compared else "")
    return details(name, table(name, columns, rows), is_open=not is_compared)

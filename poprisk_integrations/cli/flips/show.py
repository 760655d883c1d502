"""What `poprisk flips` prints: the most suspect pairs, and groups of pairs."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from poprisk_integrations.trl.pairs import on_one_line, pair_texts

__all__ = ["print_groups", "print_pairs"]

_STYLES = {"swap": "bold red", "drop": "red", "review": "yellow"}
_MOST_GROUPS = 20
_HEADS = {"annotator": "annotator", "length": "length of chosen - rejected"}


def print_pairs(
    console: Console,
    pairs: Sequence[Mapping[str, Any]],
    examples: Sequence[Mapping[str, Any]] | None = None,
    swapped: Sequence[bool] | None = None,
) -> None:
    """Print rows of a report: a table, or blocks with the texts of `examples` cut to the terminal.

    `swapped` tells whose labels were swapped on purpose, if that is known.
    """
    columns = {
        "pair": [on_one_line(str(pair["pair_id"])) for pair in pairs],
        "row": [str(pair["row"]) for pair in pairs],
        "P(wrong)": [f"{pair['probability_wrong']:.3f}" for pair in pairs],
        "margin": [f"{pair['margin']:.3f}" for pair in pairs],
        "action": [pair["action"] for pair in pairs],
    }
    if columns["pair"] == columns["row"]:
        del columns["row"]
    if swapped is not None:
        columns["swapped"] = ["yes" if swap else "no" for swap in swapped]
    rows = list(zip(*columns.values(), strict=True))
    if examples is None:
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name in columns:
            numeric = name in ("P(wrong)", "margin", "row")
            table.add_column(name, justify="right" if numeric else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
        console.print(table)
        return
    for row, example in zip(rows, examples, strict=True):
        head = Text("\n")
        for name, cell in zip(columns, row, strict=True):
            head.append(f"{name} ", style="dim").append(cell, style=_STYLES.get(cell, "bold"))
            head.append("  ")
        console.print(head)
        for name, text in zip(("prompt", "chosen", "rejected"), pair_texts(example), strict=True):
            line = Text(f"  {name:<8}  ", style="dim")
            # More would not fit; to cut here spares the console very long texts.
            line.append(Text(on_one_line(text)[: console.width], style="not dim"))
            console.print(line, no_wrap=True, overflow="ellipsis")
    console.print()


def print_groups(
    console: Console, groups: Mapping[str, Sequence[Mapping[str, Any]]], *, calibrated: bool
) -> None:
    """Print a table for each kind of group, as `group_pairs` makes them."""
    mean = "mean P(wrong)" if calibrated else "mean P(wrong), a ranking"
    for kind, rows in groups.items():
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column(_HEADS[kind], overflow="fold")
        for name in ("pairs", "suspects", mean, "95 % interval"):
            table.add_column(name, justify="right")
        for row in rows[:_MOST_GROUPS]:
            numbers = (row["pairs"], row["suspects"], f"{row['mean']:.3f}")
            interval = f"{row['low']:.3f} to {row['high']:.3f}"
            table.add_row(Text(row["group"]), *map(str, numbers), interval)
        console.print(table)
        if len(rows) > _MOST_GROUPS:
            console.print(f"{len(rows) - _MOST_GROUPS} more; --json has all.", highlight=False)

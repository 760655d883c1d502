"""The table of the most suspect pairs, with their texts shortened to the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from poprisk_integrations.trl.pair_texts import on_one_line, pair_texts

__all__ = ["pair_texts", "print_pairs"]

_STYLES = {"swap": "bold red", "drop": "red", "review": "yellow"}


def print_pairs(
    console: Console,
    pairs: Sequence[Mapping[str, Any]],
    examples: Sequence[Mapping[str, Any]] | None = None,
    swapped: Sequence[bool] | None = None,
) -> None:
    """Print the pairs with probability, margin and action: a table, or blocks with their texts.

    Args:
        console: Where. Texts end at its width.
        pairs: Rows of a flip report.
        examples: The same pairs in the data set, if it is known.
        swapped: Whether their labels were swapped on purpose, if it is known.
    """
    columns = {
        "pair": [on_one_line(str(pair["pair_id"])) for pair in pairs],
        "P(wrong)": [f"{pair['probability_wrong']:.3f}" for pair in pairs],
        "margin": [f"{pair['margin']:.3f}" for pair in pairs],
        "action": [pair["action"] for pair in pairs],
    }
    if swapped is not None:
        columns["swapped"] = ["yes" if swap else "no" for swap in swapped]
    rows = list(zip(*columns.values(), strict=True))
    if examples is None:
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name in columns:
            numeric = name in ("P(wrong)", "margin")
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

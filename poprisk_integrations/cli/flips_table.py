"""The table of the most suspect pairs, with their texts shortened to the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

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
        "pair": [_printable(str(pair["pair_id"])) for pair in pairs],
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
            line.append(Text(_printable(text)[: console.width], style="not dim"))
            console.print(line, no_wrap=True, overflow="ellipsis")
    console.print()


def pair_texts(example: Mapping[str, Any]) -> tuple[str, str, str]:
    """What a pair says: the last user message and both answers, or the texts.

    Args:
        example: A pair in one of TRL's formats: text or conversations, with a prompt or with the
            prompt as the common start of chosen and rejected.

    Returns:
        Prompt, chosen and rejected.

    Example:
        >>> user = {"role": "user", "content": "Red or blue?"}
        >>> answers = [{"role": "assistant", "content": text} for text in ("Red.", "Blue.")]
        >>> pair_texts({"chosen": [user, answers[0]], "rejected": [user, answers[1]]})
        ('Red or blue?', 'Red.', 'Blue.')
    """
    prompt, chosen, rejected = (example.get(key) for key in ("prompt", "chosen", "rejected"))
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        start = _common_start(chosen, rejected)
        # The last turn is what the answers are to; a transcript puts a blank line between turns.
        turns = [turn for turn in start.split("\n\n") if turn.strip()]
        return "\n\n".join(turns[-2:]), chosen[len(start) :], rejected[len(start) :]
    if prompt is None:
        prompt = chosen
    return _message(prompt, "user"), _message(chosen, "assistant"), _message(rejected, "assistant")


def _common_start(first: str, second: str) -> str:
    length = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        length += 1
    return first[:length]


def _message(text: Any, role: str) -> str:
    """Text as it is; of a conversation the last message of a role, or else the last message."""
    if not isinstance(text, list):
        return "" if text is None else str(text)
    messages = [message for message in text if isinstance(message, Mapping)]
    found = [message for message in messages if message.get("role") == role] or messages
    if not found:
        return ""
    content = found[-1].get("content")
    if isinstance(content, list):  # parts: text, images
        return " ".join(str(part.get("text") or f"[{part.get('type')}]") for part in content)
    return str(content or ("[tool call]" if found[-1].get("tool_calls") else ""))


def _printable(text: str) -> str:
    """On one line, and without what a terminal would obey."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())

"""Texts of every format of pairs, on lines that end with the terminal."""

import io
from typing import Any

import pytest
from rich.console import Console

from poprisk_integrations.cli.flips_table import pair_texts, print_pairs

USER = {"role": "user", "content": "q1"}
MORE = [USER, {"role": "assistant", "content": "a1"}, {"role": "user", "content": "q2"}]
TALK = "H: a\n\nA: b\n\nH: c\n\n"
PAIR = {"pair_id": "x1", "probability_wrong": 0.91251, "margin": -1.5, "action": "swap"}


def said(text: Any) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, ("p", "c", "r")),
        ({"prompt": MORE, "chosen": said("c"), "rejected": said("r")}, ("q2", "c", "r")),
        ({"chosen": [*MORE, *said("c")], "rejected": [*MORE, *said("r")]}, ("q2", "c", "r")),
        (
            {"chosen": f"{TALK}A: yes", "rejected": f"{TALK}A: no"},
            ("H: c\n\nA: ", "yes", "no"),
        ),
        ({"chosen": "yes", "rejected": "no"}, ("", "yes", "no")),
        ({"prompt": None, "chosen": None, "rejected": "r"}, ("", "", "r")),
        ({"prompt": [{"role": "system", "content": "s"}], "chosen": [], "rejected": "r"},
         ("s", "", "r")),
        (
            {
                "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text",
                 "text": "what?"}]}],
                "chosen": [{"role": "assistant", "content": None, "tool_calls": [1]}],
                "rejected": said(None),
            },
            ("[image] what?", "[tool call]", ""),
        ),
    ],
)  # fmt: skip
def test_texts(example: dict[str, Any], expected: tuple[str, str, str]) -> None:
    assert pair_texts(example) == expected


def printed(width: int, *args: Any, **kwargs: Any) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    print_pairs(console, *args, **kwargs)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_table() -> None:
    lines = printed(80, [PAIR, {**PAIR, "pair_id": 7, "action": "keep"}], swapped=[True, False])
    assert lines[1].split() == ["pair", "P(wrong)", "margin", "action", "swapped"]
    assert [line.split() for line in lines[3:5]] == [
        ["x1", "0.913", "-1.500", "swap", "yes"],
        ["7", "0.913", "-1.500", "keep", "no"],
    ]


@pytest.mark.parametrize("width", [40, 80, 200])
def test_texts_end_with_the_terminal(width: int) -> None:
    example = {"prompt": "word " * 100, "chosen": "東京" * 100, "rejected": "short"}
    lines = printed(width, [PAIR], [example])
    assert [line.split()[0] for line in lines if line.startswith("  ")] == [
        "prompt",
        "chosen",
        "rejected",
    ]
    texts = [line for line in lines if line.startswith("  ")]
    assert texts[0].endswith("…")
    assert width - 3 <= len(texts[0].rstrip()) <= width
    assert len(texts[1]) < width  # these characters are two cells wide
    assert texts[2].split() == ["rejected", "short"]


def test_texts_cannot_style_or_steer_the_terminal() -> None:
    example = {"prompt": "[red]a[/red]\x1b[31m\r\nb", "chosen": "[/x]", "rejected": "\x07\u202e"}
    lines = printed(80, [{**PAIR, "pair_id": "[b]\x1b"}], [example])
    text = "\n".join(lines)
    assert "[red]a[/red] [31m b" in text
    assert "[/x]" in text
    assert "pair [b]" in text
    assert not set("\x1b\x07\r\u202e") & set(text)

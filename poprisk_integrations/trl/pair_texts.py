"""What a preference pair says, in full and in a few words."""

from collections.abc import Mapping
from typing import Any

__all__ = ["EXCERPT", "excerpts", "on_one_line", "pair_texts"]

EXCERPT = 80  # characters of each text that a report shows
_BEFORE = 20  # of them, before the place where the answers part


def excerpts(example: Mapping[str, Any]) -> tuple[str, str, str]:
    """Prompt and answers on one line each, at most 80 characters: answers where they differ.

    Args:
        example: As for `pair_texts`.

    Example:
        >>> excerpts({"prompt": "2 + 2?", "chosen": "It is 4.", "rejected": "It is 5."})
        ('2 + 2?', 'It is 4.', 'It is 5.')
    """
    prompt, *answers = map(on_one_line, pair_texts(example))
    alike = len(_common_start(*answers))
    start = 0 if max(map(len, answers)) <= EXCERPT else max(alike - _BEFORE, 0)
    chosen, rejected = (_cut(answer, start) for answer in answers)
    return _cut(prompt, max(len(prompt) - EXCERPT, 0)), chosen, rejected  # its end is the question


def _cut(text: str, start: int) -> str:
    shown = f"…{text[start + 1 :]}" if start else text
    return shown if len(shown) <= EXCERPT else f"{shown[: EXCERPT - 1]}…"


def on_one_line(text: str) -> str:
    """Without line ends, and without what a terminal would obey."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


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

"""The text of the demo: Python's language reference as it ships with every interpreter."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["CorpusSplit", "TextWindow", "cut_windows", "reference_texts", "split_corpus"]

# Typographic quotes, dashes and the ellipsis; the few other characters are dropped.
_ASCII = {
    0x2018: "'",
    0x2019: "'",
    0x201C: '"',
    0x201D: '"',
    0x2013: "-",
    0x2014: "-",
    0x2026: "...",
}


@dataclass(frozen=True, slots=True)
class TextWindow:
    """Consecutive tokens of the corpus: a prompt and its human continuation.

    Both start at the start of a word, and the continuation ends at the end of one.
    """

    prompt: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CorpusSplit:
    """Windows by use; no token of the corpus is in two of the lists."""

    finetuning: list[TextWindow]
    train: list[TextWindow]
    heldout: list[TextWindow]


def reference_texts() -> list[str]:
    """The topics of Python's built-in help as lines of plain ASCII, one string per topic.

    Underlines of headings are dropped and white space collapses to single spaces, so that a
    continuation differs from a sample in its words rather than in its layout.
    """
    from pydoc_data.topics import topics

    texts = []
    for name in sorted(topics):
        words = topics[name].translate(_ASCII).encode("ascii", "ignore").decode().split()
        texts.append(" ".join(word for word in words if word.strip("*=-~^#")))
    return [text for text in texts if text]


def cut_windows(
    tokens: Sequence[int],
    starts_word: Sequence[bool],
    prompt_tokens: int,
    continuation_tokens: int,
) -> list[TextWindow]:
    """Tile a stretch of tokens with continuations, each prompted by what precedes it.

    A continuation starts at a word and is the longest run of whole words with at most
    `continuation_tokens` tokens (runs of under half of that are left out). Its prompt is the
    shortest run of whole words before it with at least `prompt_tokens` tokens, so prompts
    overlap the continuation before.

    Args:
        tokens: Token ids.
        starts_word: By token id, whether the token starts a word.
        prompt_tokens: Least length of a prompt.
        continuation_tokens: Greatest length of a continuation.

    Example:
        >>> window, = cut_windows([1, 2, 1, 2, 1, 2, 1], [False, True, False], 2, 4)
        >>> window.prompt, window.continuation
        ((1, 2), (1, 2, 1, 2))
    """
    words = [index for index, token in enumerate(tokens) if starts_word[token]]
    windows = []
    position = next((index for index in words if index - words[0] >= prompt_tokens), None)
    while position is not None:
        ends = [i for i in words if position < i <= position + continuation_tokens]
        if not ends:
            break
        end = ends[-1]
        if end - position >= continuation_tokens / 2:
            start = max(i for i in words if position - i >= prompt_tokens)
            windows.append(TextWindow(tuple(tokens[start:position]), tuple(tokens[position:end])))
        position = end
    return windows


def split_corpus(
    documents: Sequence[Sequence[int]],
    starts_word: Sequence[bool],
    *,
    block_tokens: int,
    prompt_tokens: int,
    continuation_tokens: int,
    train: int,
    heldout: int,
    seed: int,
) -> CorpusSplit:
    """Deal blocks of text out to held-out pairs, training pairs and fine-tuning, in that order.

    Args:
        documents: Token ids of each document.
        starts_word: By token id, whether the token starts a word.
        block_tokens: Tokens of a block; a window never leaves its block.
        prompt_tokens: See `cut_windows`.
        continuation_tokens: See `cut_windows`.
        train: Windows for training pairs.
        heldout: Windows for held-out pairs.
        seed: Of the shuffle.

    Raises:
        ValueError: If the text is too short to leave windows for fine-tuning.
    """
    blocks = [
        cut_windows(document[i : i + block_tokens], starts_word, prompt_tokens, continuation_tokens)
        for document in documents
        for i in range(0, len(document), block_tokens)
    ]
    random.Random(seed).shuffle(blocks)
    taken: list[list[TextWindow]] = []
    for count in (heldout, train):
        windows: list[TextWindow] = []
        while blocks and len(windows) < count:
            windows += blocks.pop()
        taken.append(windows[:count])
    rest = [window for block in blocks for window in block]
    if not rest:
        raise ValueError(
            f"The corpus has too few windows for {train} training pairs and {heldout} held-out "
            "pairs."
        )
    return CorpusSplit(finetuning=rest, train=taken[1], heldout=taken[0])

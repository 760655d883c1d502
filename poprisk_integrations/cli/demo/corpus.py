"""Text of the demo, Python's language reference as it ships, and the preference pairs from it."""

# transformers leaves some of its functions untyped.
# mypy: disable-error-code="no-untyped-call"

import random
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from poprisk_integrations.cli.demo.settings import DemoSettings

__all__ = [
    "PreferencePair",
    "TextWindow",
    "make_pairs",
    "reference_texts",
    "split_corpus",
    "starts_word",
    "train_tokenizer",
]

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
_SPACE = "\u0120"  # how byte-level BPE writes a leading space


@dataclass(frozen=True, slots=True)
class TextWindow:
    """Consecutive tokens of the corpus: a prompt and its human continuation.

    Both start at the start of a word, and the continuation ends at the end of one.
    """

    prompt: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """A prompt with two continuations."""

    prompt: str
    human: str  # the continuation in the corpus: the better one
    sample: str  # the model's own
    swapped: bool = False  # whether the training label says that the sample is the better one

    def row(self) -> dict[str, str]:
        """In TRL's preference format, as the label says."""
        better, worse = self.human, self.sample
        if self.swapped:
            better, worse = worse, better
        return {"prompt": self.prompt, "chosen": better, "rejected": worse}


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


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE with `<pad>` and `<eos>`; the same texts give the same tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<pad>", "<eos>"], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def starts_word(tokenizer: PreTrainedTokenizerFast) -> list[bool]:
    """By token id, whether the token starts with a space.

    BPE never merges across such a start: text cut there keeps its tokens on either side.
    """
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return [token.startswith(_SPACE) for token in tokens]


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
    overlap the continuation before. `starts_word` tells it by token id.

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
    settings: DemoSettings,
    counts: Sequence[int],
    seed: int,
) -> list[list[TextWindow]]:
    """Deal the text out to so many windows each, and the rest; no token is in two of these lists.

    It is dealt in shuffled blocks of `block_tokens` tokens, which no window leaves.
    """
    size, lengths = settings.block_tokens, (settings.prompt_tokens, settings.continuation_tokens)
    blocks = [
        cut_windows(document[i : i + size], starts_word, *lengths)
        for document in documents
        for i in range(0, len(document), size)
    ]
    random.Random(seed).shuffle(blocks)
    dealt: list[list[TextWindow]] = []
    for count in counts:
        windows: list[TextWindow] = []
        while blocks and len(windows) < count:
            windows += blocks.pop()
        dealt.append(windows[:count])
    rest = [window for block in blocks for window in block]
    if not rest:
        raise ValueError(f"The corpus has too few windows for {' and '.join(map(str, counts))}.")
    return [*dealt, rest]


def make_pairs(
    tokenizer: PreTrainedTokenizerFast,
    windows: Sequence[TextWindow],
    samples: Sequence[Sequence[int]],
) -> list[PreferencePair]:
    """Decode windows and a sample for each; a sample equal to the human text makes no pair."""
    pairs = [
        PreferencePair(
            prompt=str(tokenizer.decode(list(window.prompt))),
            human=str(tokenizer.decode(list(window.continuation))),
            sample=str(tokenizer.decode(list(sample))),
        )
        for window, sample in zip(windows, samples, strict=True)
    ]
    return [pair for pair in pairs if pair.sample != pair.human]

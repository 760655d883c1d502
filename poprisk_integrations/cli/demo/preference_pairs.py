"""Preference pairs: the human continuation against the model's own sample."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerFast

from poprisk_integrations.cli.demo.corpus import TextWindow

__all__ = ["PreferencePair", "make_pairs", "swap_labels", "to_rows"]


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """A prompt with two continuations.

    Attributes:
        prompt: Text.
        human: The continuation in the corpus: the better one.
        sample: The model's own continuation.
        swapped: Whether the training label says that the sample is the better one.
    """

    prompt: str
    human: str
    sample: str
    swapped: bool = False

    @property
    def chosen(self) -> str:
        """The continuation that the label prefers."""
        return self.sample if self.swapped else self.human

    @property
    def rejected(self) -> str:
        """The other one."""
        return self.human if self.swapped else self.sample


def make_pairs(
    tokenizer: PreTrainedTokenizerFast,
    windows: Sequence[TextWindow],
    samples: Sequence[Sequence[int]],
) -> list[PreferencePair]:
    """Decode windows and samples; a sample equal to the human text makes no pair.

    Args:
        tokenizer: Decodes both.
        windows: Prompts and human continuations.
        samples: Token ids of one sample per window.
    """
    pairs = [
        PreferencePair(
            prompt=str(tokenizer.decode(list(window.prompt))),
            human=str(tokenizer.decode(list(window.continuation))),
            sample=str(tokenizer.decode(list(sample))),
        )
        for window, sample in zip(windows, samples, strict=True)
    ]
    return [pair for pair in pairs if pair.sample != pair.human]


def swap_labels(
    pairs: Sequence[PreferencePair], share: float, *, seed: int
) -> list[PreferencePair]:
    """Swap the labels of exactly round(share * n) pairs, drawn at random.

    Args:
        pairs: Training pairs; the list is not changed.
        share: In [0, 1].
        seed: Of the draw.

    Example:
        >>> pairs = [PreferencePair("p", "h", "s")] * 10
        >>> sum(pair.swapped for pair in swap_labels(pairs, 0.3, seed=0))
        3
    """
    drawn = set(random.Random(seed).sample(range(len(pairs)), round(share * len(pairs))))
    return [replace(pair, swapped=index in drawn) for index, pair in enumerate(pairs)]


def to_rows(pairs: Sequence[PreferencePair]) -> list[dict[str, str]]:
    """Rows in TRL's preference format, as the labels say."""
    return [
        {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} for pair in pairs
    ]

"""The synthetic language: prompts, a probabilistic grammar of completions, the exact reward.

A prompt is six tokens: topic, two attributes, style, length class, separator. A completion is up to
`LONGEST` tokens, its end included.
"""

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "EOS", "LONGEST", "PAD", "PROMPT", "VOCABULARY", "all_prompts", "grammar", "lengths", "reward"
]  # fmt: skip

PROMPT, LONGEST = 6, 11
PAD, EOS, SEPARATOR, OPEN, CLOSE = range(5)
TOPICS, STYLES, CLASSES, ATTRIBUTES = 6, 2, 3, 8
TOPIC = 5
STYLE = TOPIC + TOPICS
CLASS = STYLE + STYLES
ATTRIBUTE = CLASS + CLASSES  # eight that may come first in a prompt, eight that come second
WORD = ATTRIBUTE + 2 * ATTRIBUTES
WORDS = 2  # of each topic
FILLER = WORD + WORDS * TOPICS
FILLERS = 4
VOCABULARY = FILLER + FILLERS
PHRASE = 0.35  # how often the first word of a topic is followed by the second, on purpose
TARGETS = (4, 6, 8)  # length that each class asks for


def all_prompts() -> np.ndarray:
    """Every prompt there is, shape (2304, 6)."""
    rows = [
        (TOPIC + t, ATTRIBUTE + a, ATTRIBUTE + ATTRIBUTES + b, STYLE + s, CLASS + c, SEPARATOR)
        for t in range(TOPICS)
        for a in range(ATTRIBUTES)
        for b in range(ATTRIBUTES)
        for s in range(STYLES)
        for c in range(CLASSES)
    ]
    return np.array(rows)


def grammar(prompts: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """One completion for each prompt, shape (N, 11), padded after its end.

    Position by position: a closing bracket if one is open (35 %); else, after the first word of a
    topic, its second (35 %); else a topic word (30 %, of the prompt's topic in 75 %), a filler
    (28 %), an attribute (30 to 37 %, of the prompt in 55 %: either one in the first style, mostly
    the first one in the second) or an opening bracket (12 % in the first style, 5 % in the
    second). The length is the class's target, up to two more or fewer.
    """
    count = len(prompts)
    target = np.array(TARGETS)[prompts[:, 4] - CLASS]
    length = target + random.integers(-2, 3, count)
    rows = np.full((count, LONGEST), PAD)
    is_open = np.zeros(count, dtype=bool)
    plain = prompts[:, 3] == STYLE
    first_share, opening = np.where(plain, 0.5, 0.8), np.where(plain, 0.12, 0.05)
    for place in range(LONGEST):
        own = np.where(random.random(count) < first_share, prompts[:, 1], prompts[:, 2])
        other = ATTRIBUTE + random.integers(0, 2 * ATTRIBUTES, count)
        attribute = np.where(random.random(count) < 0.55, own, other)
        topic = np.where(
            random.random(count) < 0.75, prompts[:, 0] - TOPIC, random.integers(0, TOPICS, count)
        )
        word = WORD + WORDS * topic + random.integers(0, WORDS, count)
        token = FILLER + random.integers(0, FILLERS, count)
        kind = random.random(count)
        token = np.where(kind < 0.72, word, token)
        token = np.where(kind < 0.42, attribute, token)
        if place:
            last = rows[:, place - 1]
            starts = (last >= WORD) & (last < FILLER) & ((last - WORD) % WORDS == 0)
            token = np.where(starts & (random.random(count) < PHRASE), last + 1, token)
        opens = (kind < opening) & ~is_open
        token = np.where(opens, OPEN, token)
        closes = is_open & (random.random(count) < 0.35)
        token = np.where(closes, CLOSE, token)
        is_open = (is_open | opens) & ~closes
        rows[:, place] = np.where(place < length, token, PAD)
        rows[:, place] = np.where(place == length, EOS, rows[:, place])
    return rows


def lengths(completions: Tensor) -> Tensor:
    """Tokens before the end, shape (...)."""
    return ((completions != PAD) & (completions != EOS)).sum(-1)


def reward(prompts: Tensor, completions: Tensor) -> Tensor:
    """The true reward, before it is scaled to unit standard deviation.

        r = [first attribute occurs] + s [second attribute occurs]
            - #(first word of the prompt's topic, then the second) + 0.5 s [brackets, and balanced]
            - 0.1 |length - target|

    with s = 1 in the first style and -1 in the second: what is wanted there is unwanted here.

    Args:
        prompts: Shape (..., 6).
        completions: Shape (..., 11), padded after the end.

    Returns:
        Shape (...), float32.
    """
    first, second = prompts[..., 1:2], prompts[..., 2:3]
    sign = torch.where(prompts[..., 3] == STYLE, 1.0, -1.0)
    word = (completions - WORD).div(WORDS, rounding_mode="floor") + TOPIC
    is_word = (completions >= WORD) & (completions < FILLER) & (word == prompts[..., 0:1])
    starts = is_word & ((completions - WORD) % WORDS == 0)
    forbidden = starts[..., :-1] & (completions[..., 1:] == completions[..., :-1] + 1)
    depth = ((completions == OPEN).int() - (completions == CLOSE).int()).cumsum(-1)
    balanced = (depth[..., -1] == 0) & (depth >= 0).all(-1) & (completions == OPEN).any(-1)
    target = torch.tensor(TARGETS, device=prompts.device)[prompts[..., 4] - CLASS]
    return (
        (completions == first).any(-1).float()
        + sign * (completions == second).any(-1).float()
        - forbidden.sum(-1).float()
        + 0.5 * sign * balanced.float()
        - 0.1 * (lengths(completions) - target).abs().float()
    )

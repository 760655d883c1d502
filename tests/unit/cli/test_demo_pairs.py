"""Preference pairs: which side is which, and how many labels are swapped."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from poprisk_integrations.cli.demo.corpus import TextWindow, reference_texts
from poprisk_integrations.cli.demo.pair_scores import PairScorer
from poprisk_integrations.cli.demo.preference_pairs import (
    PreferencePair,
    make_pairs,
    swap_labels,
    to_rows,
)
from poprisk_integrations.cli.demo.tokenizer import train_tokenizer

PAIRS = [PreferencePair(f" p{i}", f" h{i}", f" s{i}") for i in range(37)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(reference_texts()[:4], 400)


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.3, 11), (0.5, 18), (1.0, 37)])
def test_exact_number_of_swaps(share: float, count: int) -> None:
    swapped = swap_labels(PAIRS, share, seed=1)
    assert sum(pair.swapped for pair in swapped) == count
    assert [replace(pair, swapped=False) for pair in swapped] == PAIRS
    assert not any(pair.swapped for pair in PAIRS)


def test_swaps_follow_the_seed() -> None:
    assert swap_labels(PAIRS, 0.3, seed=1) == swap_labels(PAIRS, 0.3, seed=1)
    assert swap_labels(PAIRS, 0.3, seed=1) != swap_labels(PAIRS, 0.3, seed=2)


def test_rows_say_what_the_labels_say() -> None:
    rows = to_rows([PAIRS[0], replace(PAIRS[1], swapped=True)])
    assert rows == [
        {"prompt": " p0", "chosen": " h0", "rejected": " s0"},
        {"prompt": " p1", "chosen": " s1", "rejected": " h1"},
    ]


def test_a_sample_equal_to_the_human_text_makes_no_pair(tokenizer) -> None:
    tokens = tokenizer(" the value of an object")["input_ids"]
    window = TextWindow(tuple(tokens[:2]), tuple(tokens[2:]))
    other = tokenizer(" a name")["input_ids"]
    pairs = make_pairs(tokenizer, [window, window], [tokens[2:], other])
    assert [pair.sample for pair in pairs] == [" a name"]
    assert pairs[0].prompt + pairs[0].human == " the value of an object"


class Constant(nn.Module):
    """The same next-token distribution everywhere."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, input_ids, attention_mask, use_cache):
        assert not use_cache
        assert attention_mask.shape == input_ids.shape

        class Output:
            logits = self.logits.expand(*input_ids.shape, -1)

        return Output


def test_log_ratios_count_the_continuation_and_its_end(tokenizer) -> None:
    """By hand: a uniform reference, a policy that doubles the odds of one token."""
    size = len(tokenizer)
    pairs = [PreferencePair(" the", " value value", " name"), PreferencePair(" an", " of", " of a")]
    value, end = tokenizer(" value")["input_ids"], tokenizer.eos_token_id
    boosted = torch.zeros(size)
    boosted[end] = torch.tensor(2.0).log()
    for token in set(value):
        boosted[token] = torch.tensor(3.0).log()
    scorer = PairScorer(tokenizer, pairs, Constant(torch.zeros(size)))

    counts = [
        [len(tokenizer(text)["input_ids"]) + 1 for text in (pair.human, pair.sample)]
        for pair in pairs
    ]
    log_size = torch.tensor(float(size)).log()
    torch.testing.assert_close(scorer.reference_log_probs, -log_size * torch.tensor(counts))

    total = boosted.exp().sum().log()
    gain = log_size - total  # of any token that is not boosted
    expected = torch.tensor(counts) * gain + torch.tensor(2.0).log()
    for row, pair in enumerate(pairs):
        for column, text in enumerate((pair.human, pair.sample)):
            hits = sum(token in value for token in tokenizer(text)["input_ids"])
            expected[row, column] += hits * torch.tensor(3.0).log()
    torch.testing.assert_close(scorer.log_ratios(Constant(boosted)), expected)


def test_scoring_leaves_the_mode_alone(tokenizer) -> None:
    model = Constant(torch.zeros(len(tokenizer))).train()
    PairScorer(tokenizer, PAIRS[:3], model)
    assert model.training

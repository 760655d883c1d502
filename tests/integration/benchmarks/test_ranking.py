"""Rankings of `cleaned_pairs`: where a feature tells of wrong labels, the posteriors use it."""

import torch
from benchmarks.cleaned_pairs.language import EOS, LONGEST, PAD, PROMPT, VOCABULARY
from benchmarks.cleaned_pairs.model import WORDS, completion_logits, initial, scores
from benchmarks.cleaned_pairs.posterior import doubt_by_reasons, weighed
from sklearn.metrics import roc_auc_score

PAIRS = 2000


def made_up(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Labels of three annotators, one of them bad, who like long answers; a weak judge of them."""
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    truth, longer = draw(PAIRS).sign(), draw(PAIRS)
    second = truth + 1.5 * draw(PAIRS)  # of another judge
    margin = truth + 1.5 * draw(PAIRS)
    annotator = torch.randint(0, 3, (PAIRS,), generator=generator)
    rate = torch.tensor([0.05, 0.1, 0.45])[annotator]
    uniform = torch.rand(PAIRS, generator=generator)
    # A wrong label is given more often where it makes the longer answer the chosen one.
    wrong = uniform < rate * (1 + (-truth * longer).clamp(-1, 1))
    label = torch.where(wrong, -truth, truth)
    return {
        "margin": label * margin, "second": label * second, "longer": label * longer,
        "annotator": torch.nn.functional.one_hot(annotator).double(), "wrong": wrong,
        "fold": torch.arange(PAIRS) % 4,
    }  # fmt: skip


def auc(log_odds: torch.Tensor, wrong: torch.Tensor) -> float:
    return float(roc_auc_score(wrong, -log_odds))


def test_features_are_used_where_they_tell() -> None:
    d = made_up(torch.Generator().manual_seed(0))
    alone = auc(d["margin"], d["wrong"])
    both = torch.stack([d["margin"], d["second"]], -1)
    assert auc(weighed(both, d["fold"]), d["wrong"]) > alone + 0.05
    turning = d["longer"][:, None]
    found = doubt_by_reasons(d["margin"], turning, d["annotator"], d["fold"])
    assert auc(found, d["wrong"]) > alone + 0.05


def test_a_score_is_the_sum_over_the_states_after_each_word() -> None:
    params = initial([0, 1])
    token = 7
    params["score"] = params["head"][:, :, token]
    prompts = torch.randint(
        5, VOCABULARY, (2, 3, PROMPT), generator=torch.Generator().manual_seed(1)
    )
    completions = torch.full((2, 3, LONGEST), PAD)
    for row, words in enumerate((1, 4, LONGEST)):
        completions[:, row, :words] = 30 + torch.arange(words) % 5
        completions[:, row, words : words + 1] = EOS
    logits = completion_logits(params, prompts, completions)[..., token]
    found = scores(params, prompts, completions)
    for row, last in enumerate((1, 4, LONGEST - 1)):
        expected = logits[:, row, 1 : last + 1].sum(-1) / WORDS
        torch.testing.assert_close(found[:, row], expected)

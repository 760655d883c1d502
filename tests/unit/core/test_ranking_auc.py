"""Against scikit-learn, and against counting all pairs."""

import math

import pytest
import torch
from sklearn.metrics import roc_auc_score

from poprisk_integrations.core.ranking_auc import ranking_auc


def by_counting(scores: list[float], positive: list[bool]) -> float:
    """The definition: a win counts one, a tie half."""
    ups = [s for s, p in zip(scores, positive, strict=True) if p]
    downs = [s for s, p in zip(scores, positive, strict=True) if not p]
    wins = sum(1.0 if u > d else 0.5 if u == d else 0.0 for u in ups for d in downs)
    return wins / (len(ups) * len(downs))


@pytest.mark.parametrize("levels", [2, 5, 1000])
@pytest.mark.parametrize("count", [2, 7, 200])
def test_equals_scikit_learn_and_the_definition(levels: int, count: int) -> None:
    positive = torch.rand(count) < 0.3
    positive[0], positive[1] = True, False
    scores = torch.randint(levels, (count,)).double() / 7 + positive
    found = ranking_auc(scores, positive)
    assert found == pytest.approx(roc_auc_score(positive.numpy(), scores.numpy()), abs=1e-12)
    assert found == pytest.approx(by_counting(scores.tolist(), positive.tolist()), abs=1e-12)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([2.0, 1.0, 0.0], 1.0),
        ([0.0, 1.0, 2.0], 0.0),
        ([1.0, 1.0, 1.0], 0.5),
        ([math.inf, 0.0, -math.inf], 1.0),
    ],
)
def test_ends(scores: list[float], expected: float) -> None:
    assert ranking_auc(torch.tensor(scores), torch.tensor([True, False, False])) == expected


@pytest.mark.parametrize("label", [True, False])
def test_one_class_has_no_area(label: bool) -> None:
    assert math.isnan(ranking_auc(torch.rand(3), torch.tensor([label] * 3)))
    assert math.isnan(ranking_auc(torch.rand(0), torch.zeros(0, dtype=torch.bool)))


def test_low_precision_does_not_reach_the_sums() -> None:
    positive = torch.rand(100_000) < 0.5
    scores = torch.rand(100_000).bfloat16()
    expected = roc_auc_score(positive.numpy(), scores.double().numpy())
    assert ranking_auc(scores, positive) == pytest.approx(expected, abs=1e-12)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="one length"):
        ranking_auc(torch.rand(3), torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="NaN"):
        ranking_auc(torch.tensor([0.1, math.nan]), torch.tensor([True, False]))

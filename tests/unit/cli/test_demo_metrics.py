"""Metrics of the demo against values computed by hand."""

import math

import pytest
import torch
from torch import tensor

from poprisk_integrations.cli.demo.comparison import Comparison, compare
from poprisk_integrations.cli.demo.metrics import (
    drift,
    paired_difference,
    ranking_scores,
    share,
)

LOG_RATIOS = tensor([[0.5, -0.5], [-1.0, 2.0], [0.0, 0.0], [3.0, 1.0]])


def test_accuracy() -> None:
    assert ranking_scores(LOG_RATIOS).tolist() == [1.0, 0.0, 0.5, 1.0]
    assert share(ranking_scores(LOG_RATIOS)) == 0.625


def test_share_of_wrong_labels_fitted() -> None:
    assert share(ranking_scores(LOG_RATIOS, prefer_sample=True)) == 0.375


def test_share_of_nothing() -> None:
    assert math.isnan(share(ranking_scores(torch.empty(0, 2))))


def test_drift() -> None:
    # |.| = 0.5 0.5 1 2 0 0 3 1, mean 1
    assert drift(LOG_RATIOS, beta=0.1) == pytest.approx(0.1)


def test_paired_difference() -> None:
    # differences 1 0 0 -1 1: mean 0.2, variance 0.7
    first, second = tensor([1.0, 1.0, 0.0, 0.0, 1.0]), tensor([0.0, 1.0, 0.0, 1.0, 0.0])
    mean, error = paired_difference(first, second)
    assert mean == pytest.approx(0.2)
    assert error == pytest.approx(math.sqrt(0.7 / 5))


@pytest.mark.parametrize(
    ("difference", "verdict"),
    [(0.041, "ahead"), (0.04, "level"), (0.0, "level"), (-0.04, "level"), (-0.041, "behind")],
)
def test_verdict_at_two_standard_errors(difference: float, verdict: str) -> None:
    assert Comparison(difference, 0.02).verdict == verdict


def test_arms_that_agree_on_every_pair_are_level() -> None:
    scores = tensor([1.0, 0.0, 1.0])
    assert compare(scores, scores) == Comparison(0.0, 0.0)
    assert compare(scores, scores).verdict == "level"

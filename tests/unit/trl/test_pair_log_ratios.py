"""Margins and the mean log-ratio against numpy in float64."""

import numpy as np
import pytest
import torch

from poprisk_integrations.trl.pair_log_ratios import margin_metrics, pair_log_ratios


def test_rows_are_pairs_and_first_column_is_chosen() -> None:
    policy = torch.tensor([-1.0, -2.0, -3.0, -10.0, -20.0, -30.0], requires_grad=True)
    reference = torch.tensor([-1.5, -2.5, -3.5, -10.0, -20.0, -31.0], dtype=torch.bfloat16)
    ratios = pair_log_ratios(policy, reference)
    assert ratios.tolist() == [[0.5, 0.0], [0.5, 0.0], [0.5, 1.0]]
    assert ratios.dtype == torch.float32
    (grad,) = torch.autograd.grad(ratios[:, 0].sum() - ratios[:, 1].sum(), policy)
    assert grad.tolist() == [1.0, 1.0, 1.0, -1.0, -1.0, -1.0]


def test_metrics_equal_a_float64_twin() -> None:
    ratios = np.random.default_rng(0).normal(size=(37, 2))
    metrics = margin_metrics(torch.tensor(ratios, dtype=torch.float32), beta=0.1)
    margins = 0.1 * (ratios[:, 0] - ratios[:, 1])
    assert metrics == pytest.approx(
        {
            "poprisk/kl_data": ratios.mean(),
            "poprisk/reward_accuracy": np.mean(margins > 0),
            "poprisk/margin_p10": np.quantile(margins, 0.1),
            "poprisk/margin_p50": np.median(margins),
        },
        abs=1e-6,
    )


def test_no_pair_gives_no_metric() -> None:
    assert margin_metrics(torch.empty(0, 2), beta=0.1) == {}


def test_equal_rewards_count_half() -> None:
    ratios = torch.tensor([[1.0, 1.0], [2.0, 1.0], [1.0, 2.0], [0.0, 0.0]])
    assert margin_metrics(ratios, beta=0.1)["poprisk/reward_accuracy"] == 0.5


def test_suspect_pairs_are_told_from_the_others() -> None:
    margins = torch.tensor([3.0, 1.0, -1.0, -2.0, 0.5])
    ratios = torch.stack([margins, torch.zeros(5)], dim=1)
    suspect = torch.tensor([False, False, True, True, True])
    metrics = margin_metrics(ratios, beta=1.0, suspect=suspect)
    assert metrics["poprisk/flips_fitted"] == pytest.approx(1 / 3)
    assert metrics["poprisk/margin_p50_clean"] == 2.0
    assert metrics["poprisk/margin_p50_suspect"] == -1.0
    assert metrics["poprisk/margin_p10_suspect"] == pytest.approx(-1.8)
    none = margin_metrics(ratios, beta=1.0, suspect=torch.zeros(5, dtype=torch.bool))
    assert not any("suspect" in name or "fitted" in name for name in none)
    assert none["poprisk/margin_p50_clean"] == none["poprisk/margin_p50"]

"""Batches are gathered once, a row's first sight counts, and the summary is that of float64."""

import numpy as np
import pytest
import torch

from poprisk_integrations.core.noise_rate import UntrainedMargins
from poprisk_integrations.trl.pair_records import PairRecords, margin_metrics, reward_margins


def test_first_sight_is_by_step_not_by_place() -> None:
    # What a gather gives: all of rank 0, then all of rank 1, which saw row 5 earlier.
    ranks = [
        (torch.tensor([[1.0, 0.0], [9.0, 0.0]]), torch.tensor([[3, 0], [5, 4]])),
        (torch.tensor([[2.0, 0.0], [3.0, 0.0]]), torch.tensor([[5, 1], [4, 4]])),
    ]
    calls = []

    def gather(tensor: torch.Tensor) -> torch.Tensor:
        calls.append(tensor)
        part = 0 if tensor.is_floating_point() else 1
        return torch.cat([ranks[0][part], ranks[1][part]])

    margins = UntrainedMargins(6)
    records = PairRecords(gather, beta=0.5, margins=margins)
    records.add("train", ranks[0][0], ranks[0][1][:, 0], step=0)
    assert not calls  # no communication in a step
    records.flush()
    assert margins.margin[[3, 4, 5]].tolist() == [0.5, 1.5, 1.0]
    assert margins.step[[3, 4, 5]].tolist() == [0, 4, 1]
    ratios, rows = records.take("train")
    assert rows.tolist() == [3, 5, 5, 4]
    assert ratios[:, 0].tolist() == [1.0, 9.0, 2.0, 3.0]
    assert len(calls) == 2
    assert len(records.take("train")[0]) == 0


def test_what_leaves_no_margin() -> None:
    """Evaluations, data without rows, and pairs that are measured before training begins."""
    margins = UntrainedMargins(3)
    records = PairRecords(lambda tensor: tensor, beta=0.5, margins=margins)
    one = torch.tensor([[1.0, 0.0]])
    records.add("eval", one, torch.tensor([2]), step=0)
    records.add("train", one, None, step=0)
    records.add("sitters", one, torch.tensor([1]), step=0)
    assert records.take("eval")[1].tolist() == [2]
    assert records.take("train")[1].tolist() == [-1]
    assert not margins.seen.any()
    records.takes_sitters = True
    records.add("sitters", one, torch.tensor([1]), step=4)
    assert len(records.take("train")[1]) == 0  # not among what is logged
    assert margins.step.tolist() == [-1, 4, -1]


def test_metrics_equal_a_float64_twin() -> None:
    ratios = np.random.default_rng(0).normal(size=(37, 2))
    ratios[5] = ratios[5, 0]  # equal rewards count half
    margins = 0.1 * (ratios[:, 0] - ratios[:, 1])
    expected = {
        "poprisk/reward_accuracy": np.mean(margins > 0) + 0.5 / 37,
        "poprisk/margin_p10": np.quantile(margins, 0.1),
        "poprisk/margin_p50": np.median(margins),
    }
    found = margin_metrics(reward_margins(torch.tensor(ratios, dtype=torch.float32), beta=0.1))
    assert found == pytest.approx(expected, abs=1e-6)


def test_suspect_pairs_are_told_from_the_others() -> None:
    margins = torch.tensor([3.0, 1.0, -1.0, -2.0, 0.5])
    suspect = torch.tensor([False, False, True, True, True])
    metrics = margin_metrics(margins, suspect=suspect)
    assert metrics["poprisk/flips_fitted"] == pytest.approx(1 / 3)
    assert metrics["poprisk/margin_p50_clean"] == 2.0
    assert metrics["poprisk/margin_p50_suspect"] == -1.0
    assert metrics["poprisk/margin_p10_suspect"] == pytest.approx(-1.8)
    none = margin_metrics(margins, suspect=torch.zeros(5, dtype=torch.bool))
    assert not any("suspect" in name or "fitted" in name for name in none)
    assert none["poprisk/margin_p50_clean"] == none["poprisk/margin_p50"]

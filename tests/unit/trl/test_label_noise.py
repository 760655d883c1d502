"""Which loss is in force when, whose margin decides about a label, and what the last line says."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from poprisk_integrations.core.noise_rate import fitted_slope
from poprisk_integrations.trl.label_noise import LabelNoise, PairLoss
from poprisk_integrations.trl.label_noise_callback import describe_run
from tests.reference import preferences as twin


def wrong_labels(rate: float, count: int) -> np.ndarray:
    return np.random.default_rng(1).random(count) < rate


def estimated(
    signal: float, rate: float, mode: str = "rdpo", count: int = 2000, **options: Any
) -> LabelNoise:
    """Margins of all pairs but the last ten."""
    noise = LabelNoise(count + 10, loss=PairLoss(mode=mode), **options)
    clean = np.random.default_rng(0).normal(signal, 1, count)
    margins = np.where(wrong_labels(rate, count), -clean, clean)
    noise.margins.record(torch.arange(count), torch.as_tensor(margins), step=0)
    noise.update_estimate(step=7)
    return noise


def strong(rate: float, mode: str = "rdpo", **options: Any) -> LabelNoise:
    return estimated(1.8, rate, mode, **options)


def weak(mode: str = "rdpo", **options: Any) -> LabelNoise:
    """A model that has hardly learned: the rate cannot be told, the order of the margins can."""
    return estimated(0.4, 0.3, mode, count=1000, **options)


@pytest.mark.parametrize("mode", ["cdpo", "rdpo", "weights"])
def test_loss_is_that_of_trl_until_the_rate_is_known(mode: str) -> None:
    noise = LabelNoise(100, loss=PairLoss(mode=mode))
    assert (noise.rate, noise.loss.mode) == (None, "off")
    assert noise.p_correct(torch.arange(3), torch.zeros(3)) is None
    given = LabelNoise(100, loss=PairLoss(mode=mode), noise_rate=0.2)
    assert (given.loss.mode, given.loss.noise_rate) == (mode, 0.2)


@pytest.mark.parametrize("mode", ["off", "auto", "holder"])
def test_modes_that_need_no_rate(mode: str) -> None:
    expected = "holder" if mode == "holder" else "off"
    assert LabelNoise(100, loss=PairLoss(mode=mode)).loss.mode == expected
    assert strong(0.3, mode).loss.mode == expected
    assert weak(mode).lacks_rate is None


def test_rate_in_use_is_capped_and_the_reported_one_is_not() -> None:
    noise = strong(0.4, count=6000)
    assert noise.rate_of_report == noise.estimate.rate > 0.37
    assert noise.rate == noise.loss.noise_rate == 0.35
    assert noise.estimate_step == 7


@pytest.mark.parametrize("make", [strong, weak])
def test_a_given_rate_wins_over_the_estimate(make: Any) -> None:
    noise = strong(0.3, noise_rate=0.1) if make is strong else weak("weights", noise_rate=0.1)
    assert noise.rate == noise.rate_of_report == 0.1
    assert noise.calibrated
    assert noise.lacks_rate is None
    slope = fitted_slope(noise.margins, 0.1)
    expected = twin.flip_posterior(noise.margins.margin.numpy(), 0.1, slope)
    np.testing.assert_allclose(noise.probability_wrong().numpy(), expected, rtol=1e-9)


def test_margins_that_tell_no_rate_change_no_loss_and_rank_all_the_same() -> None:
    noise = weak()
    assert (noise.rate, noise.loss.mode, noise.calibrated) == (None, "off", False)
    assert noise.p_correct(torch.arange(3), torch.zeros(3)) is None
    assert not noise.suspects().any()
    assert noise.lacks_rate == "rdpo"
    probability = noise.probability_wrong()[:1000]
    assert torch.equal(probability.argsort(), noise.margins.margin[:1000].argsort(descending=True))
    assert roc_auc_score(wrong_labels(0.3, 1000), probability.numpy()) > 0.65


def test_pairs_of_an_unmoved_model_are_not_judged() -> None:
    noise = LabelNoise(1200, loss=PairLoss(mode="weights"))
    noise.margins.record(torch.arange(200), torch.zeros(200), step=0)
    margins = torch.as_tensor(np.random.default_rng(0).normal(1.5, 1, 1000))
    noise.margins.record(torch.arange(200, 1200), margins, step=1)
    noise.update_estimate(step=2)
    probability = noise.probability_wrong()
    assert probability[:200].isnan().all()
    assert not probability[200:].isnan().any()
    assert not noise.suspects()[:200].any()
    # Trained on by now: the present margin is memorised, the prior is not.
    found = noise.p_correct(torch.tensor([0, 1]), torch.tensor([9.0, -9.0]))
    assert found.tolist() == pytest.approx([1 - noise.rate] * 2)


def test_a_pair_s_own_early_margin_decides_not_its_present_one() -> None:
    noise = strong(0.3)
    rows = torch.tensor([0, 1, 2005, 2006])  # the last two have no margin yet
    present = torch.tensor([5.0, -5.0, 0.0, -3.0])
    margins = np.array([*noise.margins.margin[:2].tolist(), 0.0, -3.0])
    expected = 1 - twin.flip_posterior(margins, noise.rate_of_report, noise.slope)
    np.testing.assert_allclose(noise.p_correct(rows, present).numpy(), expected, atol=1e-6)
    losses = strong(0.3, "weights").losses(present, rows, None).numpy()
    np.testing.assert_allclose(losses, twin.posterior(present.numpy(), expected), atol=1e-5)


def test_suspects_are_those_more_probably_wrong_than_right() -> None:
    noise = strong(0.3)
    probability = noise.probability_wrong()
    assert noise.suspects().tolist() == [p >= 0.5 for p in probability.tolist()]
    assert 400 < int(noise.suspects().sum()) < 800
    assert probability[-10:].isnan().all()


def test_nothing_is_known_before() -> None:
    with pytest.raises(ValueError, match="not known yet"):
        LabelNoise(100, loss=PairLoss()).probability_wrong()
    with pytest.raises(ValueError, match="at least 50"):
        LabelNoise(100, loss=PairLoss()).update_estimate(step=1)


def test_state_goes_round() -> None:
    noise = strong(0.3)
    tensors, text = noise.state_dict()
    earlier = {**text, "estimate": json.dumps({"rate": 0.4, "maximum_likelihood": 0.4})}
    for saved in (text, earlier):  # an older version's estimate is made anew, of the same margins
        other = LabelNoise(2010, loss=PairLoss(mode="rdpo"))
        other.load_state_dict(tensors, saved)
        assert other.estimate == noise.estimate
        assert (other.estimate_step, other.loss) == (7, noise.loss)
        rows, margins = torch.arange(4), torch.zeros(4)
        assert torch.equal(other.p_correct(rows, margins), noise.p_correct(rows, margins))
    assert all(math.isfinite(value) for value in json.loads(text["estimate"]).values())
    empty = LabelNoise(5, loss=PairLoss())
    empty.load_state_dict(*LabelNoise(5, loss=PairLoss()).state_dict())
    assert empty.estimate is None
    with pytest.raises(ValueError, match="of 2010 pairs, the data have 5"):
        empty.load_state_dict(tensors, text)


@pytest.mark.parametrize(
    ("noise", "says", "says_not"),
    [
        (weak("rdpo"), "no noise rate for noise='rdpo': the loss is DPO's", "suspect"),
        (weak("weights"), "labels are taken as right", "suspect"),
        (weak("auto"), "the margins do not tell how many labels are wrong (0 to", "no noise rate"),
        (
            strong(0.42, count=4000),
            "loss rdpo at noise rate 0.35, the largest that is used",
            "do not tell",
        ),
        (strong(0.2, count=4000), "of the labels look wrong", "the largest"),
    ],
)
def test_the_last_line(noise: LabelNoise, says: str, says_not: str) -> None:
    line = describe_run(noise)
    assert line.startswith(str(noise.estimate))
    assert says in line
    assert says_not not in line

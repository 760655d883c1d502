"""Which loss is in force when, and whose margin decides about a label."""

import json
import math

import numpy as np
import pytest
import torch

from poprisk_integrations.core.noise_rate import fitted_slope
from poprisk_integrations.core.ranking_auc import ranking_auc
from poprisk_integrations.trl.label_noise import LabelNoise
from poprisk_integrations.trl.pair_loss import PairLoss
from tests.reference import preferences as twin


def trained(rate: float, count: int = 2000, **options: object) -> LabelNoise:
    """Margins of all pairs but the last ten, of a good model."""
    noise = LabelNoise(count + 10, **{"loss": PairLoss(mode="rdpo"), **options})  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    margins = rng.normal(1.5, 1, count) * np.where(rng.random(count) < rate, -1, 1)
    noise.margins.record(torch.arange(count), torch.as_tensor(margins), step=0)
    noise.update_estimate(step=7)
    return noise


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
    assert LabelNoise(100, loss=PairLoss(mode=mode, gamma=3.0)).loss.mode == expected
    assert trained(0.3, loss=PairLoss(mode=mode)).loss.mode == expected


def test_rate_in_use_is_capped_and_the_reported_one_is_not() -> None:
    noise = trained(0.4, count=6000)
    assert noise.estimate is not None
    assert noise.rate_of_report == noise.estimate.rate > 0.37
    assert noise.rate == noise.loss.noise_rate == 0.35
    assert noise.estimate_step == 7


def test_a_given_rate_wins_over_the_estimate() -> None:
    noise = trained(0.3, noise_rate=0.1)
    assert noise.rate == noise.rate_of_report == 0.1
    margins = noise.margins.margin[:5].numpy()
    expected = twin.flip_posterior(margins, 0.1, noise.slope)
    np.testing.assert_allclose(noise.probability_wrong()[:5].numpy(), expected, rtol=1e-9)


def weak(mode: str = "rdpo", **options: object) -> LabelNoise:
    """A model that has hardly learned: the rate cannot be told, the order of the margins can."""
    noise = LabelNoise(1000, loss=PairLoss(mode=mode), **options)  # type: ignore[arg-type]
    rng = np.random.default_rng(3)
    margins = rng.normal(0.4, 1, 1000) * np.where(np.arange(1000) < 300, -1, 1)
    noise.margins.record(torch.arange(1000), torch.as_tensor(margins), step=0)
    noise.update_estimate(step=1)
    return noise


def test_margins_that_tell_nothing_change_no_loss() -> None:
    noise = weak()
    assert noise.estimate is not None
    assert (noise.rate, noise.loss.mode, noise.calibrated) == (None, "off", False)
    assert noise.p_correct(torch.arange(3), torch.zeros(3)) is None
    assert not noise.suspects().any()
    assert noise.lacks_rate == "rdpo"


def test_the_ranking_is_kept_where_the_rate_is_not_told() -> None:
    noise = weak()
    assert noise.estimate is not None
    assert noise.estimate.rate is None
    probability = noise.probability_wrong()
    assert torch.equal(probability.argsort(), noise.margins.margin.argsort(descending=True))
    wrong = torch.arange(1000) < 300
    assert ranking_auc(probability, wrong) > 0.65
    assert noise.slope > 0


@pytest.mark.parametrize("mode", ["off", "auto", "holder"])
def test_modes_without_a_rate_lack_none(mode: str) -> None:
    assert weak(mode).lacks_rate is None
    assert weak("weights", noise_rate=0.2).lacks_rate is None


def test_a_given_rate_has_the_slope_that_fits_it() -> None:
    noise = weak(noise_rate=0.3)
    assert noise.calibrated
    slope = fitted_slope(noise.margins, 0.3)
    expected = twin.flip_posterior(noise.margins.margin.numpy(), 0.3, slope)
    np.testing.assert_allclose(noise.probability_wrong().numpy(), expected, rtol=1e-9)


def test_pairs_of_an_unmoved_model_are_not_judged() -> None:
    noise = LabelNoise(1200, loss=PairLoss(mode="weights"))
    rng = np.random.default_rng(0)
    noise.margins.record(torch.arange(200), torch.zeros(200), step=0)
    margins = torch.as_tensor(rng.normal(1.5, 1, 1000))
    noise.margins.record(torch.arange(200, 1200), margins, step=1)
    noise.update_estimate(step=2)
    assert noise.rate is not None
    probability = noise.probability_wrong()
    assert probability[:200].isnan().all()
    assert not probability[200:].isnan().any()
    assert not noise.suspects()[:200].any()
    # Trained on by now: the present margin is memorised, the prior is not.
    found = noise.p_correct(torch.tensor([0, 1]), torch.tensor([9.0, -9.0]))
    assert found is not None
    assert found.tolist() == pytest.approx([1 - noise.rate] * 2)


def test_an_estimate_of_an_earlier_version_is_made_anew() -> None:
    noise = trained(0.1)
    tensors, text = noise.state_dict()
    text["estimate"] = json.dumps({"rate": 0.4, "low": 0.3, "maximum_likelihood": 0.4})
    other = LabelNoise(2010, loss=PairLoss(mode="rdpo"))
    other.load_state_dict(tensors, text)
    assert other.estimate == noise.estimate
    assert other.loss == noise.loss


def test_a_pair_s_own_early_margin_decides_not_its_present_one() -> None:
    noise = trained(0.3)
    rows = torch.tensor([0, 1, 2005, 2006])  # the last two have no margin yet
    present = torch.tensor([5.0, -5.0, 0.0, -3.0])
    found = noise.p_correct(rows, present)
    assert found is not None
    rate, slope = noise.rate_of_report, noise.slope
    early = twin.flip_posterior(noise.margins.margin[:2].numpy(), rate, slope)
    now = twin.flip_posterior(np.array([0.0, -3.0]), noise.rate, slope)
    np.testing.assert_allclose(found.numpy(), 1 - np.concatenate([early, now]), atol=1e-6)


def test_suspects_are_those_more_probably_wrong_than_right() -> None:
    noise = trained(0.3)
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
    noise = trained(0.3)
    other = LabelNoise(2010, loss=PairLoss(mode="rdpo"))
    other.load_state_dict(*noise.state_dict())
    assert other.estimate == noise.estimate
    assert other.estimate_step == 7
    assert other.loss == noise.loss
    rows, margins = torch.arange(4), torch.zeros(4)
    assert torch.equal(other.p_correct(rows, margins), noise.p_correct(rows, margins))
    empty = LabelNoise(5, loss=PairLoss())
    empty.load_state_dict(*LabelNoise(5, loss=PairLoss()).state_dict())
    assert empty.estimate is None
    with pytest.raises(ValueError, match="of 2010 pairs, the data have 5"):
        empty.load_state_dict(*noise.state_dict())


def test_estimates_are_finite_numbers_for_json() -> None:
    estimate = trained(0.0).estimate
    assert estimate is not None
    assert all(math.isfinite(value) for value in estimate.to_json().values())

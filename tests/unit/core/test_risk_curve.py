"""The estimated test loss: against a twin, and on simulated losses with and without a visit."""

import math

import numpy as np
import pytest
import torch

from poprisk_integrations.core.risk_curve import first_pass_estimate, late_joiner_estimate
from poprisk_integrations.core.sit_out_schedule import first_epochs, smallest_pool


def twin(values, places, before, before_se):
    """The regression estimator in numpy: ordinary least squares on what was known before."""
    known = np.isfinite(before)
    if known.sum() >= max(8, len(values) / 2):
        values, places, columns = values[known], places[known], [before[known]]
    else:
        columns = []
    m = len(values)
    middle = (places.max() + places.min()) / 2
    if m >= 30:
        columns.append((places - middle) / max((places.max() - places.min()) / 2, 1e-9))
    design = np.stack([np.ones(m), *columns], axis=1)
    inverse = np.linalg.inv(design.T @ design)
    coefficients = inverse @ design.T @ values
    errors = values - design @ coefficients
    variance = errors @ errors / (m - design.shape[1])
    own = variance * inverse[0, 0]  # of the intercept: the value where all regressors are 0
    chained = bool(known.sum() >= max(8, len(known) / 2))
    slope = coefficients[1] if chained else 0.0
    earlier = np.mean(before_se[known] ** 2) if chained else 0.0
    se = math.sqrt(own + slope**2 * earlier)
    return coefficients[0], se, math.sqrt(own + (1 - slope) ** 2 * earlier)


@pytest.mark.parametrize(
    ("m", "missing"), [(8, 0), (12, 2), (29, 5), (60, 0), (60, 25), (60, 45), (500, 3)]
)
def test_agrees_with_the_twin(m, missing):
    generator = np.random.default_rng(m + missing)
    before = generator.normal(size=m)
    places = generator.uniform(size=m)
    values = 2.0 + 0.7 * before - 0.3 * places + generator.normal(size=m)
    before[:missing] = np.nan
    before_se = generator.uniform(0.05, 0.1, size=m)
    found = late_joiner_estimate(*(torch.tensor(x) for x in (values, places, before, before_se)))
    expected = twin(values, places, before, before_se)
    assert (found.value, found.se, found.change_se) == pytest.approx(expected, rel=1e-8)
    measured = found.residuals[found.residuals.isfinite()]
    assert len(measured) == (m - missing if m - missing >= max(8, m / 2) else m)


def test_too_few_examples_say_nothing():
    seven = torch.arange(7.0)
    assert late_joiner_estimate(seven, seven, seven, seven) is None
    assert first_pass_estimate(seven, seven) is None


def test_a_first_pass_is_the_mean_and_its_trend_is_no_noise():
    places = torch.linspace(0, 1, 1000)
    noise = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = first_pass_estimate(5 - 4 * places + 0.1 * noise, places)
    assert found.value == pytest.approx(3.0, abs=0.01)
    assert found.se == pytest.approx(0.1 / math.sqrt(1000), rel=0.1)
    assert float(found.residuals.mean()) == pytest.approx(0.0, abs=1e-9)


def curves(seed, n=300, epochs=6, share=0.15):
    """(estimate, standard error, truth) per epoch, and the error of the late joiners' plain mean.

    Examples have a difficulty; a visit takes away a part of it, and more the more often it comes.
    The truth is the expectation over difficulties, which no sample knows.
    """
    generator = torch.Generator().manual_seed(seed)
    difficulty = (0.5 * torch.randn(n, generator=generator)).exp()  # skewed, as losses are
    mean_difficulty = math.exp(0.125)
    joins = first_epochs(n, share=share, seed=seed, epochs=epochs)
    before = torch.full((n,), math.nan)
    before_se = before.clone()
    rows = []
    for epoch in range(epochs):
        weight = 0.4 + 0.3 * epoch
        base = 2.0 / (1 + epoch)
        noise = 0.3 * torch.randn(n, generator=generator)
        places = torch.rand(n, generator=generator)
        visits = (epoch - joins).clamp(min=0)
        losses = base - 0.1 * places + weight * difficulty * 0.7**visits + noise
        is_new = joins >= epoch
        if epoch == 0:
            is_new[:] = True
            found = first_pass_estimate(losses, places)
        else:
            found = late_joiner_estimate(
                losses[is_new], places[is_new], before[is_new], before_se[is_new]
            )
        before[is_new] = found.residuals.float()
        before_se[is_new] = found.se
        truth = base - 0.05 + weight * mean_difficulty
        rows.append((found.value, found.se, truth, float(losses[is_new].mean()) - truth))
    return rows


@pytest.fixture(scope="module")
def simulated():
    return torch.tensor([curves(seed) for seed in range(300)], dtype=torch.float64)


def test_is_unbiased_on_potential_outcomes(simulated):
    """But for the regression estimator's own bias of order 1/m, m = 9 in the last epoch here."""
    errors = simulated[..., 0] - simulated[..., 2]
    assert (errors.mean(dim=0).abs() < 0.25 * errors.std(dim=0)).all()
    assert (errors.mean(dim=0).abs()[:3] < 3.5 * errors.std(dim=0)[:3] / math.sqrt(300)).all()


def test_its_bands_cover(simulated):
    covered = (simulated[..., 0] - simulated[..., 2]).abs() <= 1.645 * simulated[..., 1]
    share = covered.double().mean(dim=0)
    assert (share > 0.82).all()
    assert (share < 0.97).all()


def test_knows_more_than_the_late_joiners_alone(simulated):
    chained = (simulated[..., 0] - simulated[..., 2]).square().mean(dim=0).sqrt()
    alone = simulated[..., 3].square().mean(dim=0).sqrt()
    assert (chained[1:] < 0.95 * alone[1:]).all()
    assert chained[-1] < 0.7 * alone[-1]  # of nine examples


@pytest.mark.parametrize(
    ("epochs", "sitters", "last"),
    [(2, 150, 150), (3, 150, 50), (4, 150, 38), (10, 150, 15), (12, 300, 30), (None, 300, 30)],
)
def test_everybody_is_trained_on_before_a_run_ends(epochs, sitters, last):
    joins = first_epochs(2000, share=0.15, seed=3, epochs=epochs)
    run = epochs or 100
    sitting = [int((joins > epoch).sum()) for epoch in range(run)]
    assert sitting == sorted(sitting, reverse=True)
    # Half of the run nobody joins, after three quarters only those of the last epoch are left.
    assert set(sitting[: max(1, run // 2 - 1)]) == {sitters}
    assert sitting[-2:] == [last, 0]
    assert set(sitting[math.ceil(0.75 * run) : -1]) <= {last}
    assert smallest_pool(2000, share=0.15, epochs=epochs) == last


def test_of_few_examples_more_wait_for_the_last_epoch():
    joins = first_epochs(400, share=0.15, epochs=20)
    assert [int((joins > epoch).sum()) for epoch in (0, 18, 19)] == [60, 12, 0]
    # Half the share would be too few to say anything.
    assert int((first_epochs(96, share=0.15, epochs=2) > 0).sum()) == 12


def test_who_sits_depends_on_the_seed_alone():
    a, b = (first_epochs(500, seed=seed, epochs=5) for seed in (1, 2))
    assert torch.equal(a, first_epochs(500, seed=1, epochs=5))
    assert not torch.equal(a, b)
    # Independent draws agree on share^2 of the examples.
    both = int(((a > 0) & (b > 0)).sum())
    assert 2 <= both <= 25


def test_of_many_examples_two_thousand_sit():
    assert int((first_epochs(100_000, share=0.15, epochs=10) > 0).sum()) == 2000


def test_nobody_sits_in_a_single_pass():
    assert not first_epochs(100, epochs=1).any()
    assert not first_epochs(100, epochs=0.4).any()


def test_where_a_tensor_lies_in_memory_changes_no_bit():
    """A resumed run must say what an uninterrupted one says."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(4, 1003, generator=generator)
    found = set()
    for offset in range(9):
        room = torch.zeros(4, 1003 + offset)
        room[:, offset:] = data
        values, places, before, ses = (row[offset:] for row in room)
        late = late_joiner_estimate(values, places, before, ses.abs())
        first = first_pass_estimate(values, places)
        found.add((late.value, late.se, late.change_se, first.value, first.se))
    assert len(found) == 1


def test_regressors_that_say_nothing_are_left_out():
    values = torch.arange(40.0)
    same = torch.zeros(40)
    found = late_joiner_estimate(values, same, same, same)
    assert found.value == pytest.approx(19.5)
    assert found.se == pytest.approx(float(values.std()) / math.sqrt(40), rel=0.05)
    assert first_pass_estimate(values, same).value == pytest.approx(19.5)

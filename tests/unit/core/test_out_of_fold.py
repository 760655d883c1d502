"""Margins averaged over epochs, against a numpy twin, and the epoch at which they are kept."""

import math

import numpy as np
import pytest
import torch

from poprisk_integrations.core.out_of_fold import MarginAverage, mean_of_judges


def epochs_of(count, wrong=0.3, pairs=400, seed=0):
    """Margins of a model that learns what labels mean, and from the third epoch on only noise."""
    rng = np.random.default_rng(seed)
    right = np.where(rng.random(pairs) < wrong, -1.0, 1.0)
    for epoch in range(count):
        signal = right * (1.5 if epoch < 2 else 0.0)
        yield (signal + rng.standard_normal(pairs)) * 0.1 * 3.0**epoch


def fit(margins):
    """The best mean log-likelihood over a fine grid, with every margin by itself."""
    h = margins / np.sqrt(np.mean(margins**2))
    slopes = np.logspace(-1.5, 1.5, 61)[:, None, None]
    rates = np.linspace(0, 0.49, 99)[None, :, None]
    right = 1 / (1 + np.exp(-slopes * h))
    return np.log((1 - rates) * right + rates * (1 - right)).mean(-1).max()


def test_the_average_is_that_of_numpy():
    average, total = MarginAverage(), np.zeros(400)
    found = []
    for epoch, margins in enumerate(epochs_of(5)):
        average.add(torch.from_numpy(margins))
        size = np.sqrt(np.mean(margins**2))
        total += margins / size
        found.append((fit(total / (epoch + 1)), total / (epoch + 1) * size))
    assert average.fits == pytest.approx([value for value, _ in found], abs=2e-3)
    assert average.best == int(np.argmax(average.fits)) == 1
    np.testing.assert_allclose(average.margins().numpy(), found[1][1], rtol=1e-12)


def test_two_epochs_without_a_better_fit_are_enough():
    average, told = MarginAverage(), []
    for margins in epochs_of(5):
        average.add(torch.from_numpy(margins))
        told.append(average.has_told)
    assert told == [False, False, False, True, True]


def test_pairs_without_a_margin_stay_without():
    average = MarginAverage()
    average.add(torch.tensor([0.5, math.nan, -0.5, 2.0]))
    average.add(torch.tensor([0.5, math.nan, -0.5, 2.0]))
    assert average.margins().isnan().tolist() == [False, True, False, False]


def test_margins_that_tell_nothing():
    average = MarginAverage()
    with pytest.raises(ValueError, match="No margins yet"):
        average.margins()
    average.add(torch.zeros(8))
    assert average.fits == pytest.approx([-math.log(2)])
    assert average.margins().tolist() == [0.0] * 8
    assert not average.has_told


def test_the_mean_of_judges_is_that_of_numpy():
    rng = np.random.default_rng(1)
    judges = rng.standard_normal((3, 50)) * np.array([[0.1], [1.0], [30.0]])
    judges[0, 4] = judges[:, 7] = judges[2, 9] = math.nan
    sizes = np.sqrt(np.nanmean(judges**2, 1))
    known = ~np.isnan(judges)
    count = known.sum(0)
    total = np.where(known, judges / sizes[:, None], 0.0).sum(0)
    expected = np.where(count, total / np.maximum(count, 1), math.nan) * sizes.mean()
    found = mean_of_judges([torch.from_numpy(h) for h in judges])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    one = torch.from_numpy(judges[0]).float()
    assert torch.equal(mean_of_judges([one])[:4], one[:4].double())  # bit for bit
    silent = mean_of_judges([torch.zeros(2), torch.tensor([1.0, -1.0])])
    assert silent.tolist() == [0.25, -0.25]
    with pytest.raises(ValueError, match="there must be a judge"):
        mean_of_judges([])

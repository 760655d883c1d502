"""Margins of pairs whose labels are partly wrong, in families that a model's margins may be of."""

from functools import cache

import numpy as np

__all__ = ["FAMILIES", "draw"]


def _gaussian(signal, z, random):
    """Right labels N(mu, 1): the logistic curve is exact."""
    return signal + z


def _logistic(signal, z, random):
    """The logistic curve is exact, the margins have a peak at zero and long tails."""
    size = np.abs(z) * random.uniform(0, 1, len(z))
    right = random.uniform(0, 1, len(z)) < 1 / (1 + np.exp(-4 * signal * size))
    return np.where(right, size, -size)


def _laplace(signal, z, random):
    """Heavy tails: beyond mu a larger margin is no surer one."""
    return signal + random.laplace(0, 1, len(z))


def _student(signal, z, random):
    """Heavier tails (three degrees of freedom): the largest margins are the least sure."""
    return signal + random.standard_t(3, len(z))


def _uneven(signal, z, random):
    """Scales that differ from pair to pair, as with the length of the answers."""
    return np.exp(0.5 * random.standard_normal(len(z))) * (signal + z)


def _unsignalled(signal, z, random):
    """Three tenths of the pairs carry no signal."""
    return np.where(random.uniform(0, 1, len(z)) < 0.3, 0.0, signal) + z


def _learning(signal, z, random):
    """A first epoch: size, signal and certainty grow from nothing."""
    time = (np.arange(len(z)) + 0.5) / len(z)
    return np.sqrt(time) * (1.5 * signal * np.sqrt(time) + z)


FAMILIES = {
    "gaussian": _gaussian,
    "logistic": _logistic,
    "laplace": _laplace,
    "student": _student,
    "uneven": _uneven,
    "unsignalled": _unsignalled,
    "learning": _learning,
}


def draw(family, auc, pairs, rate, random):
    """Margins in the order of training, each label wrong with a probability.

    Args:
        family: One of `FAMILIES`.
        auc: Probability that a right label has a larger margin than a wrong one: the signal.
        pairs: How many.
        rate: Of wrong labels.
        random: A numpy generator.
    """
    clean = FAMILIES[family](_signal(family, auc), random.standard_normal(pairs), random)
    return np.where(random.uniform(0, 1, pairs) < rate, -clean, clean)


@cache
def _signal(family, auc):
    """The strength that gives the AUC, by halving an interval on one large sample."""
    low, high = 0.0, 20.0
    for _ in range(24):
        middle = (low + high) / 2
        random = np.random.default_rng(0)
        clean = FAMILIES[family](middle, random.standard_normal(100_000), random)
        clean = random.permutation(clean)
        found = np.mean(clean[::2] > -clean[1::2])
        low, high = (middle, high) if found < auc else (low, middle)
    return (low + high) / 2

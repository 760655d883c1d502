"""Losses of preference pairs and the noise model, in float64 numpy, from their equations."""

import numpy as np


def s(x):
    return 1.0 / (1.0 + np.exp(-np.asarray(x, dtype=np.float64)))


def dpo(h):
    return -np.log(s(h))


def cdpo(h, e):
    return (1 - e) * dpo(h) + e * dpo(-h)


def rdpo(h, e):
    """The unbiased form, as published."""
    return ((1 - e) * dpo(h) - e * dpo(-h)) / (1 - 2 * e)


def bounded_rdpo(h, e, limit):
    """The published loss up to the limit; beyond it DPO's, shifted so that they meet."""
    meet = rdpo(limit, e) - dpo(limit)
    return np.where(h <= limit, rdpo(h, e), dpo(h) + meet)


def holder(h, g):
    """Density-power divergence between the observed outcome and a Bernoulli(s(h)), over 1 + g."""
    model = s(h) ** (1 + g) + s(-h) ** (1 + g)
    return (model - (1 + 1 / g) * s(h) ** g) / (1 + g)


def posterior(h, w):
    return w * dpo(h) + (1 - w) * dpo(-h)


def slope(loss, h, step=1e-6):
    """Minus the central difference quotient: the force."""
    return -(loss(h + step) - loss(h - step)) / (2 * step)


def flip_posterior(h, e, k):
    """Bayes' rule, term by term."""
    right, wrong = (1 - e) * s(k * h), e * s(-k * h)
    return wrong / (right + wrong)


def log_likelihood(h, e, k):
    p = np.clip((1 - e) * s(k * np.abs(h)) + e * s(-k * np.abs(h)), 1e-300, 1 - 1e-16)
    return float(np.sum(np.where(h > 0, np.log(p), np.log(1 - p))))

"""Gradients in pieces, as backward passes bring them, and the noise they leave."""

import torch

from tests.helpers.optim_problem import gradients

BETA1, RHO = 0.9, 0.95
SETTINGS = {"lr": 1e-2, "betas": (BETA1, 0.999), "rho": RHO, "noise_source": "microbatch"}


def backward(params, row, scale=1.0):
    """One backward pass whose gradient is `scale * row`; None leaves a parameter out."""
    loss = 0.0
    for param, grad in zip(params, row, strict=True):
        if grad is not None:
            loss = loss + (param * grad).sum() * scale
    loss.backward()


def take_step(optimizer, params, rows):
    """A step whose gradient is the sum of some rows, one backward pass for each."""
    optimizer.zero_grad()
    for row in rows:
        backward(params, row)
    optimizer.step()


def pieces(steps, count, dtype=torch.float32, seed=3):
    """Steps of `count` rows of gradients; now and then a parameter misses a pass."""
    return [
        gradients(count, dtype, seed=seed + 100 * t, signal=0.5 * (t % 2)) for t in range(steps)
    ]


def noise(optimizer, params):
    return [optimizer.state[p]["exp_dev_sq"] for p in params]


def assert_close(actual, expected, rtol=2e-5):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(
            a.double(), torch.as_tensor(e).double(), rtol=rtol, atol=1e-6 * rtol
        )

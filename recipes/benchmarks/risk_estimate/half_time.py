"""Sign change of the statistic against the best time, per direction, in a quadratic model."""

import numpy as np
import torch

from poprisk_integrations.core.risk import risk_decrease_from_sums

__all__ = ["half_time_rows"]

CURVATURES = (1.0, 0.5, 0.25)
SIGNALS = (1.0, 3.0, 10.0)  # squared distance of the optimum, in variances of the fitted weight


def half_time_rows(replicas: int = 1500, examples: int = 300, rate: float = 0.02) -> list[dict]:
    """Linear regression under full-batch gradient descent, averaged over data sets.

    Nine directions of the inputs, of curvature h and with the optimum at a distance of `signal`
    standard deviations (squared) of the fitted weight. In theory both times are exact under
    gradient flow: exp(-h t_best) = 1 / (1 + signal), and the statistic is zero at half of it.

    Args:
        replicas: Data sets.
        examples: Of each.
        rate: Step size of the descent.

    Returns:
        Per direction: `best_time` (the mean over data sets of mu_k g_S,k, the true decrease of the
        population risk, turns negative), `sign_change` (the mean of U_k does, the leave-one-out
        estimate of the k-th squared mean gradient), `ratio`, and the theory's best time.
    """
    generator = torch.Generator().manual_seed(0)
    pairs = [(h, s) for h in CURVATURES for s in SIGNALS]
    h, signal = torch.tensor(pairs, dtype=torch.float64).T
    theory = torch.log1p(signal) / h
    optimum = torch.randn(replicas, len(pairs), generator=generator, dtype=torch.float64)
    optimum *= (signal / (examples * h)).sqrt()
    steps = int(1.6 * float(theory.max()) / rate)
    every = max(1, steps // 400)
    decrease, statistic = [], []
    for part in optimum.split(100):
        x = torch.randn(len(part), examples, len(pairs), generator=generator, dtype=torch.float64)
        x *= h.sqrt()
        noise = torch.randn(len(part), examples, generator=generator, dtype=torch.float64)
        y = (x @ part[:, :, None])[..., 0] + noise
        moment = x.transpose(1, 2) @ x / examples
        target = (x * y[..., None]).mean(1)
        w = torch.zeros_like(part)
        true, found = [], []
        for step in range(steps):
            if step % every == 0:
                grads = ((x @ w[:, :, None])[..., 0] - y)[..., None] * x
                u = risk_decrease_from_sums(grads.sum(1).square(), grads.square().sum(1), examples)
                true.append((h * (w - part) * grads.mean(1)).sum(0))
                found.append(torch.as_tensor(u).sum(0))
            w = w - rate * ((moment @ w[:, :, None])[..., 0] - target)
        decrease.append(torch.stack(true))
        statistic.append(torch.stack(found))
    times = rate * every * np.arange(len(decrease[0]))
    gain, mean = (torch.stack(part).sum(0).numpy() for part in (decrease, statistic))
    rows = []
    for k, (curvature, size) in enumerate(pairs):
        best = crossing(times, gain[:, k])
        zero = crossing(times, mean[:, k])
        rows.append(
            {
                "curvature": curvature,
                "signal": size,
                "best_time": f"{best:.3f}",
                "best_time_theory": f"{float(theory[k]):.3f}",
                "sign_change": f"{zero:.3f}",
                "ratio": f"{zero / best:.3f}",
            }
        )
    return rows


def crossing(times: np.ndarray, values: np.ndarray) -> float:
    """First zero, interpolated; inf if there is none."""
    below = np.flatnonzero(values <= 0)
    if not len(below):
        return float("inf")
    i = int(below[0])
    share = values[i - 1] / (values[i - 1] - values[i])
    return float(times[i - 1] + share * (times[i] - times[i - 1]))

"""The pictures that explain the gate, for the READMEs of core and optim.

Usage, from `recipes/`: python -m pictures [--out DIR]
"""

import argparse
from pathlib import Path
from statistics import NormalDist

import torch
from benchmarks.harness.figures import plt, save
from torch import Tensor

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.core import ema_mean_variance, gate_factor, moments_alpha

BETA1, BETA2, PUBLISHED, STEPS = 0.9, 0.999, 1.0, 300
DEFAULT = moments_alpha((BETA1, BETA2), false_open_rate=0.3173)
GATED, PLAIN, NOISE = "#0072b2", "#d55e00", "#999999"


def draw_gate(path: Path) -> None:
    """The share of Adam's step by signal over noise, and which values noise reaches by chance."""
    ratio = torch.logspace(-3, 1, 400, dtype=torch.float64)
    fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4.0), dpi=130)
    for gate, scale, colour in (("hard", DEFAULT, NOISE), ("snr", 1.0, "#009e73")):
        q = gate_factor(ratio, torch.ones_like(ratio), gate=gate, alpha=DEFAULT, lambda_pop=scale)
        left.plot(ratio, q, color=colour, ls="--", label=f'"{gate}"')
    for alpha, colour, label in (
        (DEFAULT, GATED, '"soft" (default)'),
        (PUBLISHED, PLAIN, "soft, published alpha = 1"),
    ):
        q = gate_factor(ratio, torch.ones_like(ratio), gate="soft", alpha=alpha, lambda_pop=alpha)
        left.plot(ratio, q, color=colour, lw=2, label=label)
    left.set(title="what the gate lets through", ylabel="share q of Adam's step")
    for signal, colour in ((0.0, "#222222"), (0.5, "#e69f00"), (1.0, "#cc79a7")):
        passing = [share_above(value, signal) for value in ratio.tolist()]
        name = "noise alone" if signal == 0 else f"mean = {signal:g} x noise of a batch"
        right.plot(ratio, passing, color=colour, lw=2, label=name)
    right.set(title="what coordinates reach", ylabel="share above this value")
    for axis in (left, right):
        for alpha, colour in ((DEFAULT, GATED), (PUBLISHED, PLAIN)):
            axis.axvline(alpha, color=colour, lw=0.8)
        axis.set(xscale="log", xlabel="$m^2 / s$, signal over noise")
        axis.grid(color="0.9")
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "ncols": 2}
        axis.legend(fontsize=8, frameon=False, **below)
    save(fig, path)


def share_above(ratio: float, signal: float) -> float:
    """How often m^2 > ratio * (v - m^2) for Gaussian gradients of variance 1 and this mean.

    m has the variance c of an average of some 19 batches; v, of many more, is close to 1 + mean^2.
    """
    spread = ema_mean_variance(BETA1, 10_000)
    bound = (ratio / (1 + ratio) * (1 + signal**2)) ** 0.5
    law = NormalDist(signal, spread**0.5)
    return 1 - law.cdf(bound) + law.cdf(-bound)


def draw_two_coordinates(path: Path) -> None:
    """One coordinate with a signal and one without, under AdamW and under the gate."""
    gradients = torch.randn(STEPS, 2, generator=torch.Generator().manual_seed(1))
    gradients[:, 0] += 0.5
    plain, gated = torch.zeros(2), torch.zeros(2)
    ours = PopRiskAdamW([gated], lr=1e-2, weight_decay=0.0)
    adamw = torch.optim.AdamW([plain], lr=1e-2, weight_decay=0.0)
    seen = []
    for step, gradient in enumerate(gradients, start=1):
        gated.grad, plain.grad = gradient.clone(), gradient.clone()
        ours.step()
        adamw.step()
        state = adamw.state[plain]
        mean = state["exp_avg"] / (1 - BETA1**step)
        square = state["exp_avg_sq"] / (1 - BETA2**step)
        noise = (square - mean**2).clamp(min=0)
        seen.append(torch.stack([mean, (DEFAULT * noise).sqrt(), plain, gated]))
    fig, axes = plt.subplots(2, 2, figsize=(10.5, 5.0), sharex=True, dpi=130)
    for place, title in enumerate(("a coordinate with a signal", "a coordinate without")):
        _draw_coordinate(axes[:, place], gradients[:, place], torch.stack(seen)[:, :, place])
        axes[0][place].set_title(title)
    for row, name in zip(axes, ("gradient", "weight"), strict=True):
        row[0].set_ylabel(name)
        row[1].legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save(fig, path)


def _draw_coordinate(axes, gradients: Tensor, seen: Tensor) -> None:
    upper, lower = axes
    mean, bound, plain, gated = seen.T
    steps = range(1, len(gradients) + 1)
    upper.plot(steps, gradients, ".", color="0.8", ms=3, label="of one batch")
    upper.plot(steps, mean, color="#222222", lw=1.5, label="m, the average")
    upper.fill_between(
        steps, -bound, bound, color=GATED, alpha=0.25, lw=0, label="gate closed:\nnoise gets there"
    )
    upper.set_ylim(-2, 2)
    lower.plot(steps, plain, color=PLAIN, label="AdamW")
    lower.plot(steps, gated, color=GATED, lw=2, label="PopRiskAdamW")
    lower.set_xlabel("step")
    for axis in axes:
        axis.grid(color="0.9")


def main() -> None:
    """Draw both."""
    parser = argparse.ArgumentParser("python -m pictures", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    out = parser.parse_args().out
    draw_gate(out / "gate.png")
    draw_two_coordinates(out / "two_coordinates.png")


if __name__ == "__main__":
    main()

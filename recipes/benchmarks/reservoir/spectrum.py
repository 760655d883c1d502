"""(a) 2 W_S / n = I - P'P: is it exact, how much noise has been fitted, when to stop?

Squared loss |u - y|^2 / 2n, all examples in each step, float64. With the Jacobian J of the n
outputs and K = J J' a step multiplies the residuals u - y, and with them P, by I - lr K / n.
"""

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from benchmarks.harness.figures import COLOURS, plt, save
from benchmarks.reservoir.judged import Compared, gain
from torch import Tensor, nn
from torch.func import grad, vmap

TRAIN, TEST, INPUTS, WIDTH = 128, 1000, 6, 64
NOISE = 1.0  # standard deviation; that of the function to learn is 1
DRAWS = 4  # of the noise, each with both signs
LR, STEPS, POINTS = 0.3, 4000, 60
HELD = (13, 32)  # a tenth, a quarter
MODELS = ("GELU net", "ReLU net", "tangent")  # the last: the first, linearised at its start
STOPS = ("gcv", "mallows", "held_13", "held_32", "end")
NUMBERS = ("step", "train_loss", "test_loss", "fitted_here", "fitted_anew", "d_over_n", "gcv",
           "mallows", "held_13", "test_of_13", "held_32", "test_of_32")  # fmt: skip


def output(theta: Tensor, x: Tensor, *, relu: bool = False) -> Tensor:
    """Of one hidden layer, for one example; parameters in one vector."""
    w, b, v = theta.split([WIDTH * INPUTS, WIDTH, WIDTH])
    inner = w.view(WIDTH, INPUTS) @ x / INPUTS**0.5 + b
    return v @ (torch.relu(inner) if relu else nn.functional.gelu(inner)) / WIDTH**0.5


def data(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, the function to learn there, and noise: draws with both signs, (2 DRAWS, TRAIN)."""
    draw = {"generator": torch.Generator().manual_seed(1000 + seed), "dtype": torch.float64}
    x, e = torch.randn(TRAIN + TEST, INPUTS, **draw), NOISE * torch.randn(DRAWS, TRAIN, **draw)
    f = torch.sin(2 * x[:, 0]) + x[:, 1] * x[:, 2] + 0.5 * x[:, 3]
    return x, (f - f.mean()) / f.std(), torch.cat([e, -e])


def descend(
    model: str, seed: int, x: Tensor, y: Tensor, used: Tensor, lr: float, at: Sequence[int]
) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
    """Gradient descent of stacked models, one for each row of y; x goes on where y has ended.

    Yields:
        At some steps: step, outputs (R, all x), P of the first model, and of a single one W_S: by
        the loss that each step takes, and as the sum of lr P'K P, that of the flow as lr -> 0.
    """
    n = y.shape[1]
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(WIDTH * (INPUTS + 2), generator=generator, dtype=torch.float64)
    of_one = partial(output, relu=model == "ReLU net")
    jacobian_of, outputs_of = vmap(grad(of_one), (None, 0)), vmap(of_one, (None, 0))
    if model == "tangent":
        first, tangent = outputs_of(start, x), jacobian_of(start, x)
    theta = start.expand(len(y), -1).clone().requires_grad_()
    p = torch.eye(n, dtype=torch.float64)
    exact, flow = torch.zeros_like(p), torch.zeros_like(p)

    def outputs(x: Tensor) -> Tensor:
        if model == "tangent":
            return first[: len(x)] + (theta - start) @ tangent[: len(x)].T
        return vmap(outputs_of, (0, None))(theta, x)

    for step in range(at[-1] + 1):
        if step in at:
            with torch.no_grad():
                yield step, outputs(x), p, exact, flow
        loss = ((outputs(x[:n]) - y).square() * used).sum(1) / (2 * used.sum(1))
        (slope,) = torch.autograd.grad(loss.sum(), theta)
        with torch.no_grad():
            jacobian = tangent[:n] if model == "tangent" else jacobian_of(theta[0], x[:n])
            moved = jacobian @ (jacobian.T @ p)
            if len(y) == 1:
                flow = flow + lr * p.T @ moved
                exact = exact + lr * p.T @ moved - lr**2 / (2 * n) * moved.T @ moved
            p = p - lr / n * moved
            theta -= lr * slope


def identity_rows(seeds: Sequence[int], *, quick: bool) -> list[dict]:
    """Relative errors of 2 W_S / n = I - P'P and of r(T) = P r(0), with ever shorter steps."""
    found = []
    for seed, model, divisor in itertools.product(seeds, MODELS, (1, 2, 4)):
        x, f, e = data(seed)
        y = (f[:TRAIN] + e[0])[None]
        lr, steps = LR / divisor, (20 if quick else 200) * divisor
        path = descend(model, seed, x[:TRAIN], y, torch.ones_like(y), lr, (0, steps))
        (_, before, *_), (_, after, p, exact, flow) = path
        said, rest = torch.eye(TRAIN) - p.T @ p, (after - y)[0]
        pairs = {"exact": (2 * exact / TRAIN, said), "flow": (2 * flow / TRAIN, said)}
        pairs["residual"] = p @ (before - y)[0], rest
        errors = {
            name: (is_ - should).norm() / should.norm() for name, (is_, should) in pairs.items()
        }
        errors = {name: f"{float(error):.3e}" for name, error in errors.items()}
        found.append({"seed": seed, "model": model, "lr": f"{lr:g}", **errors})
    return found


def rows(seeds: Sequence[int], *, quick: bool) -> list[dict]:
    """Along training: losses, d / n, the share of noise fitted, the spectrum (first seed only)."""
    at = sorted({round(float(s)) for s in np.geomspace(1, 40 if quick else STEPS, POINTS)} | {0})
    found = []
    for seed, model in itertools.product(seeds, MODELS):
        x, f, e = data(seed)
        y = f[:TRAIN] + torch.cat([e, e[:1], e[:1]])  # the last two hold examples out
        used = torch.ones_like(y)
        for k, count in enumerate(HELD):
            used[k - len(HELD), -count:] = 0
        for step, u, p, *_ in descend(model, seed, x, y, used, LR, at):
            wrong = (u[:, :TRAIN] - y).square()
            train_loss, hat, left = wrong[0].mean(), 1 - p.trace() / TRAIN, p.square().sum() / TRAIN
            # What noise of either sign does to the outputs is half of their difference.
            fitted = (u[:DRAWS, :TRAIN] - u[DRAWS : 2 * DRAWS, :TRAIN]) / 2
            rest = (e[:DRAWS] - fitted).square().sum(1) / e[:DRAWS].square().sum(1)
            test = (u[:, TRAIN:] - f[TRAIN:]).square().mean(1) + NOISE**2
            numbers = [step, train_loss, test[0]]
            numbers += [1 - rest[0], 1 - rest[1:].mean(), 1 - left]  # noise that P has seen, other
            numbers += [train_loss / (1 - hat) ** 2, train_loss * (1 + 2 * hat / left)]
            for k, count in enumerate(HELD):
                numbers += [wrong[k - len(HELD), -count:].mean(), test[k - len(HELD)]]
            row = {"model": model, "seed": seed}
            row |= {k: f"{float(v):.6g}" for k, v in zip(NUMBERS, numbers, strict=True)}
            values = 1 - torch.linalg.svdvals(p).square().flip(0)
            row["spectrum"] = " ".join(f"{v:.3f}" for v in values) if seed == seeds[0] else ""
            found.append(row)
    return found


def runs_of(found: list[dict], model: str) -> dict[int, dict[str, np.ndarray]]:
    """Columns of each seed's run."""
    runs = {}
    for seed in dict.fromkeys(int(r["seed"]) for r in found):
        own = [r for r in found if (r["model"], int(r["seed"])) == (model, seed)]
        runs[seed] = {name: np.array([float(r[name]) for r in own]) for name in NUMBERS}
    return runs


def compare(found: list[dict], identity: list[dict]) -> Iterator[Compared]:
    """Errors of the identity, d / n less the share measured, and regrets of the stops."""
    for model, lr in dict.fromkeys((r["model"], r["lr"]) for r in identity):
        checks = [r for r in identity if (r["model"], r["lr"]) == (model, lr)]
        for name in ("exact", "flow", "residual"):
            values = {int(r["seed"]): float(r[name]) for r in checks}
            yield f"relative error, {name}", f"{model}, lr {lr}", values, False
    for model in MODELS:
        runs = runs_of(found, model)
        for name in ("fitted_here", "fitted_anew"):
            gaps = {s: run["d_over_n"] - run[name] for s, run in runs.items()}
            sizes = {s: float(np.abs(gap).mean()) for s, gap in gaps.items()}
            yield f"|d/n - {name}|, mean", model, sizes, False
            yield f"d/n - {name}, at the end", model, {s: g[-1] for s, g in gaps.items()}, False
        regret = {rule: {s: _regret(run, rule) for s, run in runs.items()} for rule in STOPS}
        for rule in STOPS:
            yield f"regret, {rule}", model, regret[rule], False
        for rule in ("gcv", "mallows"):
            for held in ("held_13", "held_32"):
                yield f"regret, {held} - {rule}", model, gain(regret[held], regret[rule]), True


def _regret(run: dict[str, np.ndarray], rule: str) -> float:
    losses = run[rule.replace("held", "test_of") if "held" in rule else "test_loss"]
    place = -1 if rule == "end" else int(run[rule].argmin())
    return float(losses[place] - run["test_loss"].min())


def draw(found: list[dict], path: Path) -> None:
    """The spectrum over training, noise fitted and predicted, and losses, of two nets."""
    fig, axes = plt.subplots(2, 3, figsize=(14, 7.6), dpi=110, sharex=True)
    for line, model in zip(axes, MODELS, strict=False):
        run = next(iter(runs_of(found, model).values()))
        step, at = run["step"], run["step"] > 0  # the axis is logarithmic
        texts = [r["spectrum"] for r in found if r["model"] == model and r["spectrum"]]
        values = np.array([[float(v) for v in text.split()] for text in texts])
        colours = plt.get_cmap("viridis")(np.linspace(0, 0.95, values.shape[1]))
        for k, colour in enumerate(colours):
            line[0].plot(step[at], values[at, k], color=colour, lw=0.7)
        line[0].set(ylabel=f"{model}: eigenvalues of $2W_S/n$", ylim=(-0.03, 1.03))
        for axis in line[:2]:
            axis.plot(step[at], run["d_over_n"][at], color=COLOURS[2], lw=2.5, label="d/n")
        for name, mark, colour in (("fitted_here", "o", 0), ("fitted_anew", "s", 1)):
            label = "measured, " + ("other noise" if colour else "noise of this run")
            line[1].plot(step[at], run[name][at], mark, ms=3.5, color=COLOURS[colour], label=label)
        line[1].set(ylabel="share of label noise fitted", ylim=(-0.1, 1.03))
        for name, colour in (("train_loss", 0), ("test_loss", 1), ("gcv", 3), ("mallows", 4)):
            look = {"color": COLOURS[colour], "ls": "--" if name in STOPS else "-"}
            line[2].plot(step[at], run[name][at], label=name.replace("_", " "), **look)
            if name in STOPS:
                place = int(run[name].argmin())
                line[2].plot(step[place], run["test_loss"][place], "v", ms=9, **look)
        line[2].set(ylabel="squared error (triangles: stops)", ylim=(0, 3))
        for axis in line:
            axis.set(xscale="log", xlabel="step")
            axis.grid(color="0.92")
            axis.legend(frameon=False, fontsize=8)
    fig.suptitle(f"{TRAIN} examples, half of the labels' variance is noise; one run")
    save(fig, path)

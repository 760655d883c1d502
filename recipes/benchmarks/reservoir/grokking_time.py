"""(d) When will a net grok: from 1/(learning rate x weight decay), or from windows early on?

Addition modulo 23, 60 % of the table, one hidden layer with squares, squared error, all examples in
each step. A forecast for one setting of rate and decay is fitted on the other settings.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from benchmarks.harness.arms import ARMS
from benchmarks.harness.figures import COLOURS, legend, plt, save
from benchmarks.harness.train import Member, Params, SupervisedTask, accuracy, squared_error, train
from benchmarks.reservoir.judged import Compared, gain
from torch import Tensor, nn

PRIME, WIDTH, SHARE, FITTED, ENOUGH = 23, 128, 0.6, 0.99, 0.95
LRS, DECAYS = (1e-3, 3e-3, 1e-2), (0.3, 1.0, 3.0)
TIME, MORE = 2.0, 100  # budget: steps = TIME / (learning rate x decay) + MORE
EARLY = ("log_fitted", "norm_change", "log_loss_change")
FORECASTS = {  # what a forecast of log(steps) is linear in, beside a constant
    "one number": (),
    "1/(lr x decay)": (),  # its slope is 1
    "early windows": EARLY,
    "both": ("log_product", *EARLY),
    "a power of lr x decay": ("log_product",),  # looked at when the others were known
}


class Squares(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


def net(prime: int) -> nn.Module:
    """With squares one hidden layer can add (Gromov, arXiv:2301.02679)."""
    inner = nn.Linear(2 * prime, WIDTH, bias=False)
    return nn.Sequential(inner, Squares(), nn.Linear(WIDTH, prime, bias=False))


def table(prime: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One-hot pairs (a, b) and a + b, to train on and to test with."""
    a, b = torch.cartesian_prod(torch.arange(prime), torch.arange(prime)).T
    x = torch.cat([nn.functional.one_hot(a), nn.functional.one_hot(b)], 1).float()
    y = nn.functional.one_hot((a + b) % prime).float()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train_at, test_at = order.tensor_split([round(SHARE * len(x))])
    return x[train_at], y[train_at], x[test_at], y[test_at]


class Addition(SupervisedTask):
    """Also measured: loss and accuracy in training, and the length of the weights."""

    def metrics(self, params: Params) -> dict[str, Tensor]:
        found = super().metrics(params)
        out, y = self.predict(params, self.x[self.data_of]), self.y[self.data_of]
        found["train_accuracy"] = torch.vmap(right)(out, y)
        found["train_loss"] = (out - y).square().mean((1, 2))
        found["norm"] = sum(p.square().flatten(1).sum(1) for p in params.values()).sqrt()
        return found


def right(out: Tensor, y: Tensor) -> Tensor:
    """Share of right answers, from one-hot ones."""
    return accuracy(out, y.argmax(-1))


def rows(seeds: Sequence[int], *, quick: bool) -> list[dict]:
    """Of each setting and seed: when training is fitted, when it groks, and slopes between."""
    prime = 5 if quick else PRIME
    found = []
    for lr, decay in ((lr, decay) for lr in LRS for decay in DECAYS):
        steps = 40 if quick else round(TIME / (lr * decay)) + MORE
        task = Addition(
            [Member(seed=s, lr=lr, weight_decay=decay) for s in seeds],
            lambda _, seed: table(prime, seed), lambda: net(prime), squared_error,
            {"accuracy": right}, batch_size=round(SHARE * prime**2), steps=steps,
            eval_steps=[round(float(s)) for s in np.geomspace(5, steps, 150)],
        )  # fmt: skip
        trace = train(task, ARMS["AdamW"])
        for m, seed in enumerate(seeds):
            found.append({"lr": lr, "decay": decay, "seed": seed, **times(trace, m)})
    return found


def times(trace: dict[str, np.ndarray], m: int) -> dict[str, str]:
    """Steps to fit the training set and to grok ("" if never), and what happens from 1 to 2 fits.

    Changes are those of the logarithm, of the weights' length and of the training loss.
    """
    step = trace["eval_step"]

    def first(name: str, enough: float) -> str:
        over = np.flatnonzero(trace[name][:, m] >= enough)
        return str(step[over[0]]) if len(over) else ""

    row = {"steps": str(step[-1]), "best_accuracy": f"{trace['accuracy'][:, m].max():.3f}"}
    row |= {"fitted": first("train_accuracy", FITTED), "grokked": first("accuracy", ENOUGH)}
    ends = [np.abs(step - k * int(row["fitted"] or 1)).argmin() for k in (1, 2)]
    for name in ("norm", "train_loss"):
        before, after = (float(np.log(trace[name][end, m])) for end in ends)
        row[f"{name}_change"] = f"{after - before:.5g}" if row["fitted"] else ""
    return row


def forecasts(found: list[dict]) -> list[dict]:
    """Of the runs that grokked after the early windows: each forecast, fitted on other settings."""
    runs = [
        {
            "setting": f"{r['lr']}, {r['decay']}",
            "seed": int(r["seed"]),
            "log_true": np.log(int(r["grokked"])),
            "log_product": np.log(float(r["lr"]) * float(r["decay"])),
            "log_fitted": np.log(int(r["fitted"])),
            "norm_change": float(r["norm_change"]),
            "log_loss_change": np.log(max(-float(r["train_loss_change"]), 1e-3)),
        }
        for r in found
        if r["grokked"] and r["fitted"] and int(r["grokked"]) > 2 * int(r["fitted"])
    ]
    for name, columns in FORECASTS.items():
        known = np.array([(name == "1/(lr x decay)") * r["log_product"] for r in runs])
        left = np.array([r["log_true"] for r in runs]) + known
        x = np.array([[1.0, *(r[column] for column in columns)] for r in runs])
        for place, run in enumerate(runs):
            others = [i for i, r in enumerate(runs) if r["setting"] != run["setting"]]
            weights, *_ = np.linalg.lstsq(x[others], left[others], rcond=None)
            run[name] = float(weights @ x[place] - known[place])
    return runs


def compare(found: list[dict]) -> Iterator[Compared]:
    """Mean size of the error of each forecast, in factors of 2, and its gain over another."""
    runs = forecasts(found)
    seeds = list(dict.fromkeys(r["seed"] for r in runs))
    if not seeds:  # of the quick form, too short for any to grok
        return
    where = f"{len(runs)} of {len(found)} runs"
    errors = {}
    for name in FORECASTS:
        sizes = {s: [abs(r[name] - r["log_true"]) for r in runs if r["seed"] == s] for s in seeds}
        errors[name] = {s: float(np.mean(x) / np.log(2)) for s, x in sizes.items()}
        yield f"error, {name}", where, errors[name], False
    one, product, early, both, power = FORECASTS
    pairs = ((one, product), (one, early), (product, early), (product, both), (power, both))
    for base, name in pairs:
        yield f"error, {base} - {name}", where, gain(errors[base], errors[name]), True


def draw(found: list[dict], path: Path) -> None:
    """Forecast against the step at which a run groks."""
    runs = forecasts(found)
    fig, axes = plt.subplots(1, len(FORECASTS), figsize=(14, 4), dpi=110, sharex=True, sharey=True)
    for axis, name in zip(axes, FORECASTS, strict=True):
        for k, setting in enumerate(dict.fromkeys(r["setting"] for r in runs)):
            own = [r for r in runs if r["setting"] == setting]
            x, y = ([np.exp(r[column]) for r in own] for column in ("log_true", name))
            axis.plot(x, y, "os"[k // 8], color=COLOURS[k % 8], label=setting, ms=5)
        axis.axline((100, 100), (1000, 1000), color="0.4", lw=0.8)
        axis.set(title=name, xlabel="step at which it groks", xscale="log", yscale="log")
        axis.grid(color="0.92")
    axes[0].set_ylabel("forecast")
    legend(fig, axes[-1], title="lr, decay")
    save(fig, path)

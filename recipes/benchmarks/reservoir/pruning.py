"""(b) Which weights can go, or stand still: by what training told of them, or by their size?

Digits, right labels and 30 % wrong ones, an MLP under AdamW. Everything that a score needs is
gathered along one run of AdamW. "after": weights are cut at its end. "during": at half of the
training they are cut, or frozen where they are, and training goes on.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from benchmarks.harness.arms import ARMS, BETAS
from benchmarks.harness.figures import COLOURS, legend, plt, save
from benchmarks.harness.stacked_adam import StackedAdam
from benchmarks.harness.train import Member, SupervisedTask, accuracy, cross_entropy, train
from benchmarks.reservoir.judged import Compared, gain, points
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, vmap

from poprisk_integrations.core import calibrated_alpha

TRAIN, TEST, BATCH, EPOCHS, LR = 800, 900, 32, 40, 3e-3
PER_EPOCH = TRAIN // BATCH
CONDITIONS = {"right": 0.0, "30 % wrong": 0.3}
OURS = ("gate history", "signal", "dissipation")
THEIRS = ("magnitude", "movement", "Wanda", "SNIP", "random")
SCORES = (*OURS, *THEIRS)
SHARES = (0.8, 0.9, 0.95)  # of the weights that are cut, or of the rows that are frozen
RHO, ALPHA = 0.99, calibrated_alpha(BETAS[0], 0.3173)  # of the default gate
# After which part of the training: 1/1, 1/2, 1/10.
WAYS = {1: ("after all", "cut"), 2: ("after half", "cut"), 10: ("after a tenth", "frozen")}
CUT = ("0.weight", "2.weight")  # the last layer stays


def digits(wrong: float, seed: int, train: int, test: int, classes: Sequence[int] = range(10)):
    """Images and labels to train on, a share of them wrong, and to test with, all right."""
    rng = np.random.default_rng(seed)
    x, y = load_digits(return_X_y=True)
    chosen = rng.permutation(np.flatnonzero(np.isin(y, list(classes))))[: train + test]
    x, y = torch.tensor(x[chosen] / 16, dtype=torch.float32), y[chosen] - min(classes)
    count, noisy = len(classes), y.copy()
    flipped = rng.choice(train, round(wrong * train), replace=False)
    noisy[flipped] = (noisy[flipped] + rng.integers(1, count, len(flipped))) % count
    return x[:train], torch.tensor(noisy[:train]), x[train:], torch.tensor(y[train:])


def mlp() -> nn.Module:
    first, second = nn.Linear(64, 128), nn.Linear(128, 64)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(64, 10))


class Digits(SupervisedTask):
    """`start`: weights to go on from, a row for each member."""

    def __init__(self, members: list[Member], epochs: int, start: Tensor | None = None) -> None:
        self.start, steps = start, epochs * PER_EPOCH
        super().__init__(
            members, lambda c, seed: digits(CONDITIONS[c], seed, TRAIN, TEST), mlp, cross_entropy,
            {"accuracy": accuracy}, batch_size=BATCH, steps=steps, eval_steps=(steps,),
        )  # fmt: skip

    def initial(self) -> dict[str, Tensor]:
        return super().initial() if self.start is None else self.named(self.start)

    def named(self, theta: Tensor) -> dict[str, Tensor]:
        """A matrix of rows as stacked tensors."""
        shapes = {name: p.shape for name, p in self.model.named_parameters()}
        parts = theta.split([shape.numel() for shape in shapes.values()], 1)
        pairs = zip(shapes.items(), parts, strict=True)
        return {name: part.unflatten(1, shape) for (name, shape), part in pairs}


def decay(part: float = math.inf) -> Callable[[float], float]:
    """A linear schedule to zero; of what is left after 1/part of the training."""
    return lambda done: (1 - 1 / part) * (1 - done)


class Watching(StackedAdam):
    """AdamW that gathers scores of all weights, and fills in `kept` after so many steps."""

    def __init__(self, *args, kept: dict[int, dict]) -> None:
        super().__init__(*args)
        self.kept, self.sums = kept, {}

    def _add(self, **terms: Tensor) -> None:
        for name, term in terms.items():
            self.sums[name] = self.sums.get(name, 0) + term

    @torch.no_grad()
    def step(self, theta: Tensor, grad: Tensor, factor: float = 1.0) -> None:
        before, t = theta.clone(), self.at
        mean = self.moments[0] / (1 - BETAS[0] ** t) if t else torch.zeros_like(grad)
        super().step(theta, grad, factor)
        if t:  # the noise of the default gate, and the gate that it would have been
            s = RHO * self.sums.get("s", 0) + (1 - RHO) * (grad - mean).square()
            self.sums["s"] = s
            mean = self.moments[0] / (1 - BETAS[0] ** (t + 1))
            ratio = mean.square() / (s / (1 - RHO**t)).clamp_min(1e-30)
            self._add(gate=(1 - ALPHA / ratio.clamp_min(1e-30)).clamp_min(0))
        self._add(movement=-grad * before, dissipation=grad * (before - theta))
        self._add(first=grad, second=grad.square())
        if (t + 1) % PER_EPOCH == 0:  # F of each weight: signal and noise of a window's mean
            mean = self.sums.pop("first") / PER_EPOCH
            spread = (self.sums.pop("second") / PER_EPOCH - mean.square()) / (PER_EPOCH - 1)
            self._add(signal=mean.square() - spread, noise=spread)
        if t + 1 in self.kept:
            now = {name: x.clone() for name, x in {**self.sums, "theta": theta}.items()}
            self.kept[t + 1] |= {**now, "moments": [x.clone() for x in self.moments]}


class Held(StackedAdam):
    """AdamW that goes on with given moments, and whose weights outside `free` stay as they are."""

    def __init__(self, *args, moments: list[Tensor], at: int, free: Tensor) -> None:
        super().__init__(*args)
        self.moments, self.at, self.free = [x.clone() for x in moments], at, free

    @torch.no_grad()
    def step(self, theta: Tensor, grad: Tensor, factor: float = 1.0) -> None:
        before = theta.clone()
        super().step(theta, grad, factor)
        theta.copy_(torch.where(self.free, theta, before))


def scores(task: Digits, kept: dict, seed: int) -> dict[str, dict[str, Tensor]]:
    """Of every weight that can be cut, by name of the score and of the tensor."""
    theta = kept["theta"]
    params = task.named(theta)
    x, y = task.x[task.data_of], task.y[task.data_of]

    def loss(p: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
        return cross_entropy(functional_call(task.model, p, (a,)), b)

    slope = vmap(torch.func.grad(loss))(params, x, y)
    inputs = [x, torch.relu(x @ params["0.weight"].mT + params["0.bias"][:, None])]
    sizes = {k: a.square().sum(1).sqrt()[:, None] for k, a in zip(CUT, inputs, strict=True)}
    flat = {
        "gate history": kept["gate"],
        "signal": kept["signal"] / kept["noise"].clamp_min(1e-30),
        "magnitude": theta.abs(),
        **{name: kept[name] for name in ("dissipation", "movement")},
        "random": torch.rand(theta.shape, generator=torch.Generator().manual_seed(seed)),
    }
    found = {name: {k: task.named(x)[k] for k in CUT} for name, x in flat.items()}
    found["Wanda"] = {k: params[k].abs() * sizes[k] for k in CUT}
    found["SNIP"] = {k: (params[k] * slope[k]).abs() for k in CUT}
    return {name: found[name] for name in SCORES}


def chosen(task: Digits, score: dict[str, Tensor], share: float, unit: str, name: str) -> Tensor:
    """What is left (True), as rows: all but the lowest share of each tensor's weights or rows.

    Wanda cuts that share of each row, as published.
    """
    left = {key: torch.ones_like(p, dtype=torch.bool) for key, p in task.initial().items()}
    for key, value in score.items():
        x = value.mean(2, keepdim=True) if unit == "row" else value
        flat = x if (name, unit) == ("Wanda", "weight") else x.flatten(1)
        order = flat.argsort(-1).argsort(-1)
        left[key] = (order >= round(share * flat.shape[-1])).reshape(x.shape).expand_as(value)
    return torch.cat([x.flatten(1) for x in left.values()], 1)


def rows(seeds: Sequence[int], *, quick: bool) -> list[dict]:
    """Accuracy on right labels of every way, share, score, condition and seed."""
    epochs = 10 if quick else EPOCHS
    members = [Member(seed=s, condition=c, lr=LR) for c in CONDITIONS for s in seeds]
    task, steps = Digits(members, epochs), epochs * PER_EPOCH
    kept: dict[int, dict] = {steps // part: {} for part in WAYS}
    train(task, ARMS["AdamW"], schedule=decay(), optimizer_class=partial(Watching, kept=kept))
    found = []
    for part, (when, what) in WAYS.items():
        at = steps // part
        now, unit = kept[at], "row" if what == "frozen" else "weight"
        ways = [("none", 0.0, "none", torch.ones_like(now["theta"], dtype=torch.bool))]
        ways += [
            (what, share, name, chosen(task, score, share, unit, name))
            for name, score in scores(task, now, seeds[0]).items()
            for share in SHARES
        ]
        for some in (ways[i : i + 9] for i in range(0, len(ways), 9)):  # side by side
            start = [now["theta"] * (left if w == "cut" else 1) for w, _, _, left in some]
            moments = [torch.cat([x] * len(some)) for x in now["moments"]]
            free = torch.cat([left for *_, left in some])
            rest = Digits(members * len(some), (steps - at) // PER_EPOCH, torch.cat(start))
            held = partial(Held, moments=moments, at=at, free=free)
            if rest.steps:
                trace = train(rest, ARMS["AdamW"], schedule=decay(part), optimizer_class=held)
                ends = trace["accuracy"][-1]
            else:
                ends = rest.metrics(rest.initial())["accuracy"].numpy()
            for (w, share, name, _), right in zip(some, ends.reshape(len(some), -1), strict=True):
                for member, value in zip(members, right, strict=True):
                    way = {"when": when, "what": w, "share": share, "score": name}
                    run = {"condition": member.condition, "seed": member.seed}
                    found.append({**way, **run, "accuracy": f"{value:.4f}"})
    return found


def compare(found: list[dict]) -> Iterator[Compared]:
    """Each of our scores against each of theirs, mean over shares and conditions, in points."""
    for when, what in WAYS.values():
        where = f"{what} {when} of training"
        right = {name: points(found, when=when, what=what, score=name) for name in SCORES}
        whole = points(found, when=when, what="none")
        yield "accuracy, nothing", where, whole, False
        for name, own in right.items():
            yield f"accuracy, {name}", where, own, False
            if what == "frozen":
                yield f"{name} - nothing", where, gain(own, whole), True
        for name in OURS:
            for rival in THEIRS:
                yield f"{name} - {rival}", where, gain(right[name], right[rival]), True


def draw(found: list[dict], path: Path) -> None:
    """Accuracy against the share that was cut or frozen, for each score."""
    fig, axes = plt.subplots(len(CONDITIONS), len(WAYS), figsize=(12, 7), dpi=110, sharex=True)
    for line, condition in zip(axes, CONDITIONS, strict=True):
        for axis, (when, what) in zip(line, WAYS.values(), strict=True):
            own = {"when": when, "condition": condition}
            for name, colour in zip(SCORES, COLOURS, strict=True):
                at = [points(found, what=what, score=name, share=s, **own) for s in SHARES]
                look = {"marker": "o", "ls": "-"} if name in OURS else {"marker": "s", "ls": "--"}
                means = [np.mean([*by_seed.values()]) for by_seed in at]
                axis.plot(SHARES, means, color=colour, label=name, ms=4, **look)
            axis.axhline(np.mean([*points(found, what="none", **own).values()]), color="0.5", lw=1)
            axis.set(title=f"{what} {when} of training\nlabels {condition}", xticks=SHARES)
            axis.set_xlabel(f"share of {'rows' if what == 'frozen' else 'weights'} {what}")
            axis.grid(color="0.92")
        line[0].set_ylabel("% right on clean test data")
    legend(fig, axes[0][0])
    save(fig, path)

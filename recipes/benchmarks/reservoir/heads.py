"""(c) Can the end of training be computed? A head in closed form, and a jump with the whole kernel.

Digits 5 to 9, 200 of them to train on. Ridge regression on one-hot labels, its strength by GCV:
of a net's last hidden layer (a head), or of all its parameters, linearised (the jump).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from benchmarks.harness.arms import ARMS
from benchmarks.harness.figures import COLOURS, plt, save
from benchmarks.harness.train import Member, Params, SupervisedTask, accuracy, cross_entropy, train
from benchmarks.reservoir.judged import Compared, gain, points
from benchmarks.reservoir.pruning import digits
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

TRAIN, TEST, BATCH, LR = 200, 600, 20, 3e-3
EPOCHS = (0, 1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 60, 80, 100)
CLOSED = (0, 1, 3, 10, 30, 100)  # when a head is computed, and the jump
WRONG = {"right": 0.0, "30 % wrong": 0.3}
NEW, OLD = range(5, 10), range(5)  # classes to tell, and those that a body was pretrained on
HIDDEN = 128
STRENGTHS = torch.logspace(-6, 3, 37, dtype=torch.float64)
HEAD_RATES = (1e-3, 1e-2, 1e-1)
MARKS = {"own head": "-", "closed head": "o-", "jump": "s-"}


def ridge(kernel: Tensor, residual: Tensor) -> Tensor:
    """Dual weights a of ridge regression, so that K(x, X) a is what it adds at x.

    Of the strengths s, times the mean of the kernel's diagonal, the one with the smallest
        GCV(s) = |(I - H) r|^2 / n / (tr(I - H) / n)^2,    I - H = s (K + s)^-1
    of the kernel K, (n, n), and what is to be added, the residual r, (n, outputs).
    """
    values, vectors = torch.linalg.eigh(kernel.double())
    turned = vectors.T @ residual.double()
    s = STRENGTHS[:, None] * values.mean()
    left = s / (values.clamp_min(0) + s)  # (strengths, n): eigenvalues of I - H
    gcv = (left.square() @ turned.square().sum(1)) / left.mean(1).square()
    best = int(gcv.argmin())
    return vectors @ (turned * (left[best] / s[best])[:, None])


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, len(NEW)))


def body(params: Params, x: Tensor) -> Tensor:
    """The last hidden layer, of one model."""
    return torch.relu(x @ params["0.weight"].T + params["0.bias"])


def head_accuracy(features: Tensor, y: Tensor, test_features: Tensor, test_y: Tensor) -> float:
    """Of ridge regression with an intercept, strength by GCV."""
    mean = features.mean(0)
    x, targets = features - mean, nn.functional.one_hot(y, len(NEW)).double()
    weights = ridge(x @ x.T, targets - targets.mean(0))
    out = (test_features - mean).double() @ (x.double().T @ weights) + targets.mean(0)
    return float(accuracy(out, test_y))


def jump_accuracy(params: Params, x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor) -> float:
    """Of the linearised net after ridge regression of what is left of the labels."""
    model = net()

    def outputs(p: Params, a: Tensor) -> Tensor:
        return functional_call(model, p, (a[None],))[0]

    def jacobian(a: Tensor) -> Tensor:
        parts = vmap(jacrev(outputs), (None, 0))(params, a)
        return torch.cat([part.flatten(2) for part in parts.values()], 2).flatten(0, 1)

    own, there = jacobian(x), jacobian(test_x)
    now = functional_call(model, params, (x,))
    rest = nn.functional.one_hot(y, len(NEW)) - now
    weights = ridge(own @ own.T, rest.reshape(-1, 1)).float()
    added = (there @ (own.T @ weights)).reshape(len(test_x), -1)
    return float(accuracy(functional_call(model, params, (test_x,)) + added, test_y))


def one_hot_error(out: Tensor, y: Tensor) -> Tensor:
    """Squared error against one-hot labels."""
    return (out - nn.functional.one_hot(y, out.shape[-1])).square().sum(-1).mean()


class Watched(SupervisedTask):
    """Its `kept` gets the parameters of each evaluation, those before training first."""

    kept: list[Params]

    def metrics(self, params: Params) -> dict[str, Tensor]:
        self.kept.append({name: p.detach().clone() for name, p in params.items()})
        return super().metrics(params)


def trained(members, data, module, loss, epochs: Sequence[int], count: int):
    """The task, used up, and its trace; evaluated after each of the epochs."""
    per = count // BATCH
    task = Watched(
        members, data, module, loss, {"accuracy": accuracy},
        batch_size=BATCH, steps=epochs[-1] * per, eval_steps=[e * per for e in epochs],
    )  # fmt: skip
    task.kept = []
    return task, train(task, ARMS["AdamW"])


def rows(seeds: Sequence[int], *, quick: bool) -> list[dict]:
    """Accuracy on right labels, of every way to get a head, by epoch, labels and seed."""
    epochs = (0, 1) if quick else EPOCHS
    members = [Member(seed=s, condition=c, lr=LR) for c in WRONG for s in seeds]
    data = {(c, s): digits(w, s, TRAIN, TEST, NEW) for c, w in WRONG.items() for s in seeds}
    found: list[dict] = []

    def add(member: Member, features: str, way: str, epoch: int, right: float, lr="") -> None:
        row = {"features": features, "way": way, "lr": lr, "epoch": epoch}
        row |= {"condition": member.condition, "seed": member.seed}
        found.append({**row, "accuracy": f"{right:.4f}"})

    untrained: dict[int, Params] = {}
    for name, loss in (("cross-entropy", cross_entropy), ("squared error", one_hot_error)):
        features = f"learned, {name}"
        task, trace = trained(members, lambda c, s: data[c, s], net, loss, epochs[1:], TRAIN)
        for m, member in enumerate(members):
            x, y, test_x, test_y = data[member.condition, member.seed]
            for place, epoch in enumerate(epochs):
                add(member, features, "own head", epoch, trace["accuracy"][place, m])
                if epoch not in CLOSED:
                    continue
                params = {k: p[m] for k, p in task.kept[place].items()}
                untrained.setdefault(member.seed, params)
                right = head_accuracy(body(params, x), y, body(params, test_x), test_y)
                add(member, features, "closed head", epoch, right)
                if name == "squared error":
                    right = jump_accuracy(params, x, y, test_x, test_y)
                    add(member, features, "jump", epoch, right)
    first = [Member(seed=s, lr=LR) for s in seeds]
    old = {s: digits(0.0, s, 800, 100, OLD) for s in seeds}
    task, _ = trained(first, lambda _, s: old[s], net, cross_entropy, (1 if quick else 20,), 800)
    pretrained = {s: {k: p[m] for k, p in task.kept[-1].items()} for m, s in enumerate(seeds)}
    heads = [Member(seed=m.seed, condition=m.condition, lr=r) for r in HEAD_RATES for m in members]
    for name, bodies in (("untrained", untrained), ("pretrained", pretrained)):
        frozen = {
            (c, s): (body(bodies[s], x), y, body(bodies[s], test_x), test_y)
            for (c, s), (x, y, test_x, test_y) in data.items()
        }
        _, trace = trained(
            heads, lambda c, s, frozen=frozen: frozen[c, s], lambda: nn.Linear(HIDDEN, len(NEW)),
            cross_entropy, epochs[1:], TRAIN,
        )  # fmt: skip
        for m, member in enumerate(heads):
            for place, epoch in enumerate(epochs):
                right = trace["accuracy"][place, m]
                add(member, f"frozen, {name}", "own head", epoch, right, f"{member.lr:g}")
        for member in members:
            right = head_accuracy(*frozen[member.condition, member.seed])
            add(member, f"frozen, {name}", "closed head", 0, right)
    return found


def compare(found: list[dict]) -> Iterator[Compared]:
    """Closed head and jump against the own head at the same epoch, at its end and at its best."""
    for features, condition in dict.fromkeys((r["features"], r["condition"]) for r in found):
        own = [r for r in found if (r["features"], r["condition"]) == (features, condition)]
        where = f"{features}, labels {condition}"
        epochs = sorted({int(r["epoch"]) for r in own})
        curves = [
            [points(own, way="own head", lr=lr, epoch=epoch) for epoch in epochs]
            for lr in dict.fromkeys(r["lr"] for r in own if r["way"] == "own head")
        ]
        # In hindsight: one rate for the end, any rate and epoch of each seed for the best.
        curve = max(curves, key=lambda c: sum(c[-1].values()))
        best = {s: max(at[s] for c in curves for at in c) for s in curve[-1]}
        rivals = {"own head at the end": curve[-1], "own head at its best": best}
        for rival, values in rivals.items():
            yield f"accuracy, {rival}", where, values, False
        closed = ((r["way"], int(r["epoch"])) for r in own if r["way"] != "own head")
        for way, epoch in dict.fromkeys(closed):
            got = points(own, way=way, epoch=epoch)
            yield f"accuracy, {way} at {epoch}", where, got, False
            if features.startswith("learned"):
                rivals["own head then"] = curve[epochs.index(epoch)]
            for rival, values in rivals.items():
                yield f"{way} at {epoch} - {rival}", where, gain(got, values), True


def draw(found: list[dict], path: Path) -> None:
    """Accuracy over epochs: own head, closed head, jump."""
    kinds = list(dict.fromkeys(r["features"] for r in found))
    fig, axes = plt.subplots(len(WRONG), len(kinds), figsize=(13, 6.2), dpi=110, sharey="row")
    for line, condition in zip(axes, WRONG, strict=True):
        for axis, features in zip(line, kinds, strict=True):
            own = [r for r in found if (r["features"], r["condition"]) == (features, condition)]
            for k, (way, lr) in enumerate(dict.fromkeys((r["way"], r["lr"]) for r in own)):
                part = [r for r in own if (r["way"], r["lr"]) == (way, lr)]
                epochs = sorted({int(r["epoch"]) for r in part})
                means = [np.mean([*points(part, epoch=e).values()]) for e in epochs]
                label = f"{way}, lr {lr}" if lr else way
                if len(epochs) == 1:  # needs no training
                    axis.axhline(means[0], color=COLOURS[k], label=label)
                else:
                    axis.plot(epochs, means, MARKS[way], color=COLOURS[k], ms=4, label=label)
            axis.set(title=f"{features}\nlabels {condition}", xscale="symlog", xlim=(0, None))
            axis.set_xlabel("epoch")
            axis.grid(color="0.92")
            axis.legend(frameon=False, fontsize=8)
        line[0].set_ylabel("% right on clean test data")
    save(fig, path)

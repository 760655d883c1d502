"""Few relevant inputs: excess error under gates and controls; rules in README.md."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from benchmarks.harness.figures import draw_ends, draw_rates
from benchmarks.harness.gate_study import (
    DRAWN,
    GATE_OPTIONS,
    Family,
    GateStudy,
    Traces,
    against_controls,
    judged,
    said,
)
from benchmarks.harness.provenance import hardware
from benchmarks.harness.tables import SCORES, Paired, against, score_rows
from benchmarks.harness.train import Member, SupervisedTask, Trace, squared_error
from torch import Tensor, nn

__all__ = ["MODELS", "STUDY", "Drawn", "Model", "SparseSignalTask", "draw", "rotation"]

WIDTH, TEACHER_UNITS, TEST = 32, 4, 1000
LARGEST = 5.0  # norms beyond are of runs that broke down


@dataclass(frozen=True, kw_only=True)
class Model:
    """A family of problems: d inputs of which some carry the signal, n training examples.

    `noise` is the standard deviation on y; the signal's is 1.
    """

    inputs: int
    relevant: int
    train: int
    batch_size: int
    steps: int
    noise: float = 0.7


MODELS = {
    "linear": Model(inputs=200, relevant=5, train=100, batch_size=10, steps=3000),
    "net": Model(inputs=50, relevant=3, train=300, batch_size=32, steps=1500),
}


@dataclass(frozen=True)
class Drawn:
    """The data of one (condition, seed)."""

    x: Tensor  # training inputs, shape (n, d)
    y: Tensor  # noisy targets, shape (n, 1)
    test_x: Tensor  # test inputs
    test_y: Tensor  # test targets without noise
    basis: Tensor  # orthogonal R, shape (d, d); inputs are x = R z, the signal is of z
    relevant: Tensor  # which coordinates of z carry the signal, shape (d,), bool
    weight: Tensor  # the linear signal in terms of x, shape (d,); zeros for the network


def rotation(count: int, generator: torch.Generator) -> Tensor:
    """Random orthogonal matrix, uniform (Haar)."""
    q, r = torch.linalg.qr(torch.randn(count, count, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).float()


def draw(condition: str, seed: int) -> Drawn:
    """Data of a seed; `rotated` differs from `sparse` by the rotation of the inputs alone."""
    name, kind = condition.split(" ")
    model, generator = MODELS[name], torch.Generator().manual_seed(seed)
    d, k = model.inputs, model.inputs if kind == "dense" else model.relevant
    relevant = torch.zeros(d, dtype=torch.bool)
    relevant[torch.randperm(d, generator=generator)[:k]] = True
    z = torch.randn(model.train + TEST, d, generator=generator)
    noise = model.noise * torch.randn(model.train, 1, generator=generator)
    turned = rotation(d, generator)
    basis = turned if kind == "rotated" else torch.eye(d)
    weight = torch.zeros(d)
    if name == "linear":
        signs = torch.randn(k, generator=generator).sign()
        weight[relevant] = signs / k**0.5
        clean = (z @ weight)[:, None]
        weight = basis @ weight
    else:
        clean = _teacher(z[:, relevant], generator)
    x, n = z @ basis.T, model.train
    return Drawn(x[:n], clean[:n] + noise, x[n:], clean[n:], basis, relevant, weight)


def _teacher(z: Tensor, generator: torch.Generator) -> Tensor:
    """Sum of ReLU units with random directions, mean 0 and variance 1 over Gaussian inputs."""
    directions = torch.randn(z.shape[1], TEACHER_UNITS, generator=generator)
    directions = directions / directions.norm(dim=0)
    signs = torch.tensor([1.0, -1.0]).repeat(TEACHER_UNITS // 2)

    def raw(a: Tensor) -> Tensor:
        return (a @ directions).relu() @ signs

    many = raw(torch.randn(20_000, z.shape[1], generator=generator))
    return ((raw(z) - many.mean()) / many.std())[:, None]


class SparseSignalTask(SupervisedTask):
    """Squared error on noisy targets, batch by batch.

    Metrics: `excess`, mean squared distance to the clean targets (exact for the linear model, where
    it is |w - w*|^2; on test inputs for the network), in units of the signal's variance. `on`,
    `off`: norm of the weights on the relevant inputs and on the others, in the basis z of the
    signal (of the first layer for the network). All members are of one family, whose steps are the
    default.
    """

    def __init__(self, members: list[Member], *, steps: int | None = None) -> None:
        self.family = members[0].condition.split(" ")[0]
        model, drawn = MODELS[self.family], []

        def data(condition: str, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            drawn.append(draw(condition, seed))
            one = drawn[-1]
            return one.x, one.y, one.test_x, one.test_y

        steps = steps or model.steps
        # About logarithmic, so that every rate has its best step near one.
        usual = (10, 20, 30, 50, 75, 100, 150, 200, 300, 400, 500, 600, 800, 1000, 1250, 1500, 2000)
        super().__init__(
            members,
            data,
            _linear if self.family == "linear" else _network,
            squared_error,
            {"excess": squared_error},
            batch_size=model.batch_size,
            steps=steps,
            eval_steps=sorted({s for s in (*usual, 2500) if s < steps} | {steps}),
        )
        self.basis = torch.stack([one.basis for one in drawn])
        self.relevant = torch.stack([one.relevant for one in drawn]).float()
        self.weight = torch.stack([one.weight for one in drawn])

    def metrics(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """Excess error and where the weights are."""
        first = params["weight" if self.family == "linear" else "0.weight"]  # (M, out, d)
        size = (first @ self.basis[self.data_of]).square().sum(1)  # W x = (W R) z
        relevant = self.relevant[self.data_of]
        if self.family == "linear":
            excess = (first[:, 0] - self.weight[self.data_of]).square().sum(1)
        else:
            excess = super().metrics(params)["excess"]
        return {
            "excess": excess,
            "on": (size * relevant).sum(1).sqrt(),
            "off": (size * (1 - relevant)).sum(1).sqrt(),
        }


def _linear() -> nn.Module:
    """Starts at zero: what it knows it has from the data."""
    module = nn.Linear(MODELS["linear"].inputs, 1, bias=False)
    nn.init.zeros_(module.weight)
    return module


def _network() -> nn.Module:
    return nn.Sequential(nn.Linear(MODELS["net"].inputs, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1))


def _basis_effect(paired: Paired) -> Paired:
    """Relative difference on sparse minus that on rotated data of the same seed."""
    return {
        (condition.split(" ")[0], seed): value
        - paired[condition.replace("sparse", "rotated"), seed]
        for (condition, seed), value in paired.items()
        if condition.endswith("sparse")
    }


def _families(linear: Sequence[float], net: Sequence[float]) -> dict[str, Family]:
    """Of these learning rates."""
    return {
        "linear": Family(
            conditions=("linear sparse", "linear rotated", "linear dense"),
            lrs=linear,
            decays=(0.0, 0.1),
            group=270,
        ),
        "net": Family(conditions=("net sparse", "net rotated"), lrs=net, group=70),
    }


def _tables(found: Traces) -> dict[str, list[dict]]:
    """The summary of the members without weight decay."""
    scores = [
        row
        for traces in found.values()
        for arm, trace in traces.items()
        for row in score_rows(arm, _undecayed(trace), "excess", higher=False)
    ]
    return {"undecayed": STUDY.summary(scores)}


def _pictures(found: Traces, rows: list[dict], out: Path) -> None:
    for name, traces in found.items():
        some = {arm: _trained(traces[arm]) for arm in DRAWN if arm in traces}
        path = out / f"rates_{name}_{hardware()}.png"
        draw_rates(some, "excess", path, higher=False, label="excess error", log=True)
    rows = [r for r in rows if r["weight_decay"] == "0"]
    draw_ends(
        rows,
        [c for c in dict.fromkeys(r["condition"] for r in rows) if not c.endswith("dense")],
        ("on_end", "off_end"),
        ("norm on the relevant inputs", "norm off them"),
        out / f"weights_{hardware()}.png",
        figsize=(11, 8),
        largest=LARGEST,
    )


def _verdict(summary: list[dict]) -> list[str]:
    lines = []
    for arm in judged(summary):
        rows = {
            (group, column): against(summary, arm, "AdamW", column, group)
            for group in STUDY.shown
            for column in SCORES
        }
        basis = against(summary, arm, "AdamW", "tuned", "sparse minus rotated")
        own = against_controls(summary, arm, "sparse")
        lines += [said(row) for row in (*rows.values(), basis, *own)]
        sparse, other = (rows[group, "tuned"]["word"] for group in STUDY.shown)
        lines.append(f"=> {arm}: {_conclusion(sparse, other, basis['word'], own)}")
    return lines


def _undecayed(trace: Trace) -> Trace:
    mine = trace["weight_decay"] == 0.0
    return {key: x if key == "eval_step" else x[..., mine] for key, x in trace.items()}


def _trained(trace: Trace) -> Trace:
    """Worse than untrained counts as untrained."""
    return {**trace, "excess": np.fmin(trace["excess"], trace["excess"][:1])}


def _conclusion(sparse: str, other: str, basis: str, own: list[dict]) -> str:
    """Of the words on sparse and on other data, of the basis, and against controls."""
    if sparse != "better":
        return f"no win on sparse signals with a tuned rate ({sparse}); elsewhere {other}"
    text = f"wins on sparse signals with a tuned rate; rotated or dense: {other}"
    text += {
        "better": "; the gain needs the signal along the coordinates",
        "level": "; that the coordinates matter is not shown",
        "worse": "; the gain is larger without the coordinates",
    }[basis]
    if own:
        alone = all(row["word"] == "better" for row in own)
        text += "; the gain is the gate's own" if alone else "; a control reaches the gain"
    return text


STUDY = GateStudy(
    folder=Path(__file__).parent,
    families=_families(
        (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
        (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    ),
    quick=_families((3e-4, 3e-3), (3e-4, 3e-3)),
    build=lambda members, steps: SparseSignalTask(members, steps=steps),
    metrics={"excess": False, "on": False, "off": False},
    scored=("excess",),
    groups={
        "all": lambda condition: True,
        "sparse": lambda condition: condition.endswith("sparse"),
        "rotated or dense": lambda condition: not condition.endswith("sparse"),
    },
    shown=("sparse", "rotated or dense"),
    better="gain in excess error, % of AdamW's",
    verdict=_verdict,
    more={"sparse minus rotated": _basis_effect},
    tables=_tables,
    pictures=_pictures,
)
TAKES = GATE_OPTIONS
main = STUDY.main

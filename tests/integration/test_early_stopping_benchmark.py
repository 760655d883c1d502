"""The harness of the early-stopping benchmark measures what the package does, rule by rule."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from poprisk_integrations.diagnostics import GradientWindow

FOLDER = Path(__file__).parents[2] / "recipes" / "benchmarks" / "early_stopping"


@pytest.fixture
def recipe(monkeypatch):
    """The recipe's modules, without leaving them importable for other tests."""
    names = ("tasks", "language", "ensemble", "rivals", "ours", "grid")
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    import ensemble
    import ours
    import rivals
    import tasks

    yield ensemble, tasks, rivals, ours
    for name in set(sys.modules) - before:
        if name in names:
            del sys.modules[name]


def member_alone(task, epochs, lr, batch):
    """The last member trained by itself, with the package's window beside it."""
    torch.manual_seed(task.members[-1]["seed"])
    model = task.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=task.weight_decay)
    x, y = task.train[0][-1], task.train[1][-1]
    steps = len(x) // batch
    window = GradientWindow(steps, accumulator="exact", epoch_steps=steps)
    generator = torch.Generator().manual_seed(17)
    found = []
    for _ in range(epochs):
        order = torch.rand(task.train[0].shape[:2], generator=generator).argsort(1)[-1]
        for i in range(steps):
            rows = order[i * batch : (i + 1) * batch]
            optimizer.zero_grad()
            task.loss(model(x[rows]), y[rows]).backward()
            window.add(list(model.parameters()))
            optimizer.step()
        found.append(window.close())
    with torch.no_grad():
        loss = float(task.loss(model(task.test[0][-1]), task.test[1][-1]))
    return found, loss


def test_a_member_of_an_ensemble_trains_and_measures_as_alone(recipe):
    ensemble, tasks, _, ours = recipe
    task = tasks.build("T3", range(2))
    trace = ensemble.train(task, "AdamW", 3e-3, 32, epochs=8)  # fewer have shorter windows
    found, loss = member_alone(task, 8, 3e-3, 32)
    assert trace["test_loss"][-1, -1] == pytest.approx(loss, rel=1e-4)
    full = {f"full/{name}": value for name, value in trace.items()}
    for kind, name in (("white", "ratio"), ("pooled", "pooled_ratio")):
        expected = [getattr(window, name) for window in found]
        np.testing.assert_allclose(ours.ratios(full, kind)[:, -1], expected, rtol=2e-3)
    noises = [float(window.noise.sum()) for window in found]
    np.testing.assert_allclose(trace["w_noise"][:, -1].sum(-1), noises, rtol=1e-3)
    errors = [window.ratio_se for window in found]
    np.testing.assert_allclose(trace["w_pooled_spread"][:, -1], errors, rtol=1e-3)
    decreases = [window.risk_decrease for window in found[1:]]
    np.testing.assert_allclose(trace["w_progress"][1:, -1], decreases, rtol=0.02, atol=1e-4)


def test_point_statistics_equal_naive_forms(recipe):
    """The EB criterion as cockpit computes it: 1 - (B/D) sum of gbar^2 / variance, with B - 1."""
    ensemble, tasks, _, _ = recipe
    task = tasks.build("T2", range(1))
    trace = ensemble.train(task, "SGD", 0.0, 32, epochs=1)  # the weights stay
    torch.manual_seed(0)
    model = task.model()
    x, y = task.train[0][0], task.train[1][0]
    grads = []
    for k in range(len(x) // 32):
        rows = slice(32 * k, 32 * (k + 1))
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        parts = torch.autograd.grad(loss, list(model.parameters()))
        grads.append(torch.cat([g.flatten() for g in parts]).double())
    g = torch.stack(grads)
    count, mean, variance = len(g), g.mean(0), g.var(0, unbiased=True)
    alive = variance > 1e-12 * g.square().sum(0)
    evidence = (count * mean.square() / variance)[alive].mean()
    expected = float(evidence) * (count - 3) / (count - 1)
    assert trace["p_eb"][0, 0] == pytest.approx(expected, rel=1e-3)
    u = float(mean.square().sum() - variance.sum() / count)
    assert trace["p_u"][0, 0] == pytest.approx(u, rel=1e-3)
    pairs = [float((g[i] - g[j]).norm()) for i in range(5) for j in range(i)]
    assert trace["p_disparity"][0, 0] == pytest.approx(np.mean(pairs), rel=1e-3)


def column(values):
    return np.array(values, dtype=float)[:, None]


def test_rivals_stop_where_their_papers_say(recipe):
    _, _, rivals, _ = recipe
    trace = {
        "full/test_loss": column(range(10)),
        "full/p_eb": column([3, 2, 0.9, 1.1, 0.8, 0.7, 0.6, 0.5, 0.4]),
        "full/p_u": column([1, 1, 1, -1, -1, -1, -1, -1, -1]),
        "full/p_disparity": column([1, 2, 1, 2, 1, 2, 3, 4, 5]),
        "full/changed": column([0, 90, 60, 30, 20, 30, 40, 90, 90, 90]),
        "hold10/held_loss": column([5, 4, 3, 4, 4, 2, 3, 3, 3, 3]),
    }
    assert rivals.eb_criterion(trace) == [3]
    assert rivals.eb_criterion(trace, patience=2) == [6]
    assert rivals.eb_criterion(trace, stretch=2.0) == [6]
    assert rivals.raw_u(trace) == [4]
    assert rivals.gradient_disparity(trace, 3) == [6]
    assert rivals.gradient_disparity(trace, 3, in_a_row=True) == [8]
    assert rivals.label_wave(trace, k=1) == [4]
    assert rivals.hold_out(trace, 10, patience=2) == [2]
    assert rivals.hold_out(trace, 10, patience=3) == [5]
    assert rivals.label_wave({"full/test_loss": column([1])}) is None


def test_the_budget_of_a_seed_comes_from_the_others(recipe):
    _, _, rivals, _ = recipe
    losses = np.full((6, 3), 9.0)
    losses[[1, 3, 5], [0, 1, 2]] = 0.0
    trace = {"full/test_loss": losses, "condition": np.array(["a"] * 3)}
    assert rivals.fixed_budget(trace).tolist() == [4, 3, 2]

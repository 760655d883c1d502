"""The risk decrease of a window: the lagged product along the steps that were taken."""

import math
from itertools import pairwise

import pytest
import torch

from poprisk_integrations.diagnostics import GradientWindow
from tests.reference.risk import bartlett_error, displacement_decrease

SHAPES = ((4, 3), (5,), (0,))


def walk(steps, seed=0, dtype=torch.float32):
    """(weights, gradients) of a run, each per step and tensor."""
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return [torch.randn(s, generator=generator).to(dtype) for s in SHAPES]

    return [(draw(), draw()) for _ in range(steps)]


def feed(window, params, rows):
    for weights, grads in rows:
        for p, w, g in zip(params, weights, grads, strict=True):
            p.data.copy_(w)
            p.grad = g.clone()
        window.add(params)


def make(dtype=torch.float32):
    return [torch.nn.Parameter(torch.zeros(s, dtype=dtype)) for s in SHAPES]


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors]).double()


def twin(rows):
    return displacement_decrease(
        [flat(w).tolist() for w, _ in rows], [flat(g).tolist() for _, g in rows]
    )


@pytest.mark.parametrize("accumulator", ["exact", "sample"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_twin_over_two_windows(accumulator, dtype):
    """The first term of a run is missing; a window takes over the weights of the one before."""
    rows, params = walk(12, dtype=dtype), make(dtype)
    window = GradientWindow(6, accumulator=accumulator)
    terms = twin(rows)
    for start, expected in ((0, terms[:5]), (6, terms[5:])):
        feed(window, params, rows[start : start + 6])
        result = window.close()
        assert result.risk_decrease == pytest.approx(sum(expected) / len(expected), rel=1e-4)
        assert result.risk_decrease_se == pytest.approx(bartlett_error(expected, 2), rel=1e-4)


def test_terms_of_skipped_steps_are_left_out():
    rows, params = walk(8), make()
    rows[3][1][0].fill_(math.inf)  # the step is skipped: the weights stay ...
    rows[4] = (rows[3][0], rows[4][1])  # ... and say nothing about a direction
    window = GradientWindow(8)
    feed(window, params, rows)
    result = window.close()
    kept = [t for i, t in enumerate(twin(rows), start=1) if i not in (3, 4)]
    assert result.steps == 7
    assert result.risk_decrease == pytest.approx(sum(kept) / len(kept), rel=1e-4)


def test_a_zero_product_of_a_step_that_moved_counts():
    p = torch.nn.Parameter(torch.zeros(2))
    window = GradientWindow(4)
    for weight, grad in ((0.0, 1.0), (1.0, 0.0), (2.0, 0.0), (3.0, -6.0)):
        p.data[0], p.grad = weight, torch.tensor([grad, 1.0])
        window.add([p])
    assert window.close().risk_decrease == pytest.approx((0 + 0 + 6) / 3)


def test_fewer_than_two_terms_are_nan():
    params, window = make(), GradientWindow(4)
    steps = walk(2)
    feed(window, params, [steps[0]] * 3 + [steps[1]])  # two of the weights never moved
    result = window.close()
    assert math.isnan(result.risk_decrease)
    assert math.isnan(result.risk_decrease_se)


def test_large_tensors_are_scaled_up_from_the_sample():
    p = torch.nn.Parameter(torch.zeros(500, 400))
    window = GradientWindow(4, accumulator="exact")
    for step in range(4):
        p.data.fill_(-float(step))
        p.grad = torch.full((500, 400), 0.5 + step)
        window.add([p])
    assert window.close().risk_decrease == pytest.approx(200_000 * 2.5, rel=1e-5)


@pytest.mark.parametrize("steps", [71, 100])
def test_is_unbiased_for_the_decrease_along_the_last_step(steps):
    """SGD at constant slope mu in noise: the step -lr g decreases the loss by lr |mu|^2."""
    generator = torch.Generator().manual_seed(0)
    mu, lr, windows = torch.full((50,), 0.2), 0.1, 60
    p, window = torch.nn.Parameter(torch.zeros(50)), GradientWindow(steps)
    results = []
    while len(results) < windows:
        p.grad = mu + torch.randn(50, generator=generator)
        window.add([p])
        p.data.sub_(p.grad, alpha=lr)
        if window.is_full:
            results.append(window.close())
    mean = sum(r.risk_decrease for r in results) / windows
    error = math.sqrt(sum(r.risk_decrease_se**2 for r in results)) / windows
    assert abs(mean - lr * 50 * 0.04) < 3 * error
    assert error < 0.15 * lr * 50 * 0.04


@pytest.mark.parametrize("steps", [40, 80])
def test_its_error_is_right_for_the_correlated_terms_of_momentum(steps):
    generator = torch.Generator().manual_seed(1)
    means, errors = [], []
    p, velocity, window = (
        torch.nn.Parameter(torch.zeros(30)),
        torch.zeros(30),
        GradientWindow(steps),
    )
    for _ in range(steps * 150):
        p.grad = 0.1 + torch.randn(30, generator=generator)
        window.add([p])
        velocity.mul_(0.9).add_(p.grad)
        p.data.sub_(velocity, alpha=0.01)
        if window.is_full:
            result = window.close()
            means.append(result.risk_decrease)
            errors.append(result.risk_decrease_se)
    spread = torch.tensor(means[1:]).std()
    reported = torch.tensor(errors[1:]).square().mean().sqrt()
    assert 0.8 < float(reported / spread) < 1.2


@pytest.mark.parametrize("accumulator", ["exact", "sample"])
def test_a_long_window_measures_spread_pairs(accumulator):
    """Of 100 steps every fourth, with the step before it; the window after it alike."""
    rows, params = walk(200), make()
    rows[31][1][0][0, 0] = math.nan  # ends a pair
    rows[36][1][0][0, 0] = math.nan  # neither ends nor starts one
    window = GradientWindow(100, accumulator=accumulator)
    terms = [math.nan, *twin(rows)]
    agreed = [math.nan, *(flat(a) @ flat(b) for (_, a), (_, b) in pairwise(rows))]
    for start in (0, 100):
        feed(window, params, rows[start : start + 100])
        found = window.state_dict()
        positions = [t for t in range(start + 3, start + 100, 4) if t != 31]
        expected = [terms[t] for t in positions]
        measured = found["agreements"].sum(1)
        assert measured[measured.isfinite()].tolist() == pytest.approx(
            [float(agreed[t]) for t in positions], rel=1e-4, abs=1e-4
        )
        result = window.close()
        assert result.risk_decrease == pytest.approx(sum(expected) / len(expected), rel=1e-4)
        lags = max(1, math.floor(4 * (len(expected) / 100) ** (2 / 9)))
        assert result.risk_decrease_se == pytest.approx(bartlett_error(expected, lags), rel=1e-4)


def test_steps_between_the_pairs_are_not_read():
    params, window = make(), GradientWindow(100)
    for step, (weights, grads) in enumerate(walk(100)):
        if step % 4 < 2:
            weights = [torch.full_like(w, math.nan) for w in weights]
        feed(window, params, [(weights, grads)])
    assert not math.isnan(window.close().risk_decrease_se)


def test_can_be_switched_off():
    params, window = make(), GradientWindow(6, measure_risk=False)
    feed(window, params, walk(6))
    assert window.state_dict()["previous"] == {}
    result = window.close()
    assert math.isnan(result.risk_decrease)
    assert not math.isnan(result.ratio_se)

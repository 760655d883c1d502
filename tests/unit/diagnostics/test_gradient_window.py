"""A window's numbers against float64 twins, whatever gradients come in."""

import math
from itertools import pairwise

import pytest
import torch

from poprisk_integrations.diagnostics import GradientWindow
from poprisk_integrations.diagnostics.window_layout import LARGEST_EXACT, WindowLayout
from tests.reference.risk import (
    agreement_terms,
    bartlett_error,
    displacement_decrease,
    whitened_ratio,
    window_ratio,
    window_ratio_error,
)

SHAPES = ((4, 3), (5,), (0,))
both_accumulators = pytest.mark.parametrize("accumulator", ["exact", "sample"])


def make(dtype=torch.float32):
    return [torch.nn.Parameter(torch.zeros(s, dtype=dtype)) for s in SHAPES]


def walk(steps, dtype=torch.float32):
    """(weights, gradients) of a run, each per step and tensor."""
    generator = torch.Generator().manual_seed(0)

    def draw(mean):
        return [(torch.randn(s, generator=generator) + mean).to(dtype) for s in SHAPES]

    return [(draw(0.0), draw(0.2)) for _ in range(steps)]


def gradients(steps):
    return [grads for _, grads in walk(steps)]


def feed(window, params, weights, grads, **options):
    for p, w, g in zip(params, weights, grads, strict=True):
        p.data.copy_(w)
        p.grad = None if g is None else g.clone()
    window.add(params, **options)


def feed_gradients(window, params, rows):
    for row in rows:
        feed(window, params, params, row)


def arrays(rows):
    return [torch.stack([r[i].flatten() for r in rows]).double().numpy() for i in (0, 1)]


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors]).double()


def gains(rows):
    """What each step would take off the loss if it were repeated; the first of a run has none."""
    weights, grads = ([flat(part).tolist() for part in parts] for parts in zip(*rows, strict=True))
    return displacement_decrease(weights, grads)


@both_accumulators
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_equals_its_twin_over_two_windows(accumulator, dtype):
    """A window takes over the last step of the one before, for the first of its pairs."""
    rows, params = walk(12, dtype), make(dtype)
    window, terms = GradientWindow(6, accumulator=accumulator), gains(rows)
    for start, expected in ((0, terms[:5]), (6, terms[5:])):
        for weights, grads in rows[start : start + 6]:
            assert not window.is_full
            feed(window, params, weights, grads)
        assert window.is_full
        result, tensors = window.close(), arrays([g for _, g in rows[start : start + 6]])
        assert result.steps == 6
        assert result.ratio == pytest.approx(whitened_ratio(tensors), rel=1e-4)
        assert result.pooled_ratio == pytest.approx(window_ratio(tensors), rel=1e-4)
        assert result.ratio_se == pytest.approx(window_ratio_error(tensors), rel=1e-4)
        assert result.risk_decrease == pytest.approx(sum(expected) / len(expected), rel=1e-4)
        assert result.risk_decrease_se == pytest.approx(bartlett_error(expected, 2), rel=1e-4)
        if start == 0:
            agreed = agreement_terms(tensors)
            assert result.agreement == pytest.approx(sum(agreed) / len(agreed), rel=1e-4)
            assert result.agreement_se == pytest.approx(bartlett_error(agreed, 2), rel=1e-4)


def decide_on_device(monkeypatch):
    """The accelerator's branches on CPU tensors."""
    build = WindowLayout.__init__

    def patched(self, *args):
        build(self, *args)
        self.on_host = False

    monkeypatch.setattr(WindowLayout, "__init__", patched)


@both_accumulators
@pytest.mark.parametrize("scale", [1.0, 0.5, torch.tensor(0.5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decision_on_the_device_equals_that_on_the_host(monkeypatch, accumulator, scale, dtype):
    rows = walk(6, dtype)
    rows[4][1][0][0, 0] = float("nan")
    rows[2][1][1] = None
    results = []
    for _ in range(2):
        window, params = GradientWindow(steps=6, accumulator=accumulator), make(dtype)
        for weights, grads in rows:
            feed(window, params, weights, grads, scale=scale)
        results.append(window.close())
        decide_on_device(monkeypatch)
    host, device = results
    assert host.steps == device.steps == 5
    for name in ("ratio", "ratio_se", "risk_decrease", "risk_decrease_se", "agreement"):
        assert getattr(host, name) == pytest.approx(getattr(device, name), rel=1e-4), name
    assert torch.allclose(host.noise, device.noise, rtol=1e-5)


@both_accumulators
@pytest.mark.parametrize("as_tensor", [False, True])
def test_explicit_gradients_whose_scale_undoes_clipping(accumulator, as_tensor):
    params, rows = [p.detach() for p in make()], gradients(6)
    window = GradientWindow(steps=6, accumulator=accumulator)
    for step, row in enumerate(rows):
        factor = 0.5**step
        scale = torch.tensor(1 / factor) if as_tensor else 1 / factor
        window.add(params, grads=[*(factor * g for g in row[:2]), None], scale=scale)
    assert window.close().ratio == pytest.approx(whitened_ratio(arrays(rows)), rel=1e-5)
    with pytest.raises(ValueError, match="Invalid grads: 1 for 3 parameters"):
        window.add(params, grads=[None])


def test_a_window_of_several_passes_is_compared_with_the_noise_of_one():
    window, rows = GradientWindow(steps=6, epoch_steps=4), gradients(6)
    feed_gradients(window, make(), rows)
    result = window.close()
    assert result.ratio == pytest.approx(whitened_ratio(arrays(rows)) / 1.5, rel=1e-5)
    assert result.pooled_ratio == pytest.approx(window_ratio(arrays(rows)) / 1.5, rel=1e-5)


def test_a_gradient_that_never_changes_does_not_decide_for_all():
    """Of 17 coordinates one is constant: it counts 100, not infinity."""
    window, rows = GradientWindow(steps=12), gradients(12)
    for row in rows:
        row[0][0, 0] = 0.1
    feed_gradients(window, make(), rows)
    assert window.close().ratio < (16 * 5 + 100) / 17


def test_auto_is_exact_up_to_a_size_and_syncs_only_at_the_close():
    """`.item()`, `bool()` or `float()` of a meta tensor would raise."""
    for numel, expected in ((LARGEST_EXACT, "exact"), (LARGEST_EXACT + 1, "sample")):
        param = torch.nn.Parameter(torch.empty(numel, device="meta"))
        window = GradientWindow(steps=4)
        for _ in range(4):
            param.grad = torch.empty(numel, device="meta")
            window.add([param])
        assert window.state_dict()["accumulator"] == expected
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            window.close()


@both_accumulators
def test_other_parameters_in_mid_window_start_it_afresh(accumulator):
    """Frozen, thawed, added: the run goes on, and the next whole window counts again."""
    params, window, rows = make(), GradientWindow(4, accumulator=accumulator), gradients(7)
    feed_gradients(window, params, rows[:1])
    params[0].requires_grad_(False)
    feed_gradients(window, params, rows[1:3])
    assert (window.seen, window.restarts) == (2, 1)
    params[0].requires_grad_(True)
    feed_gradients(window, params, rows[3:])
    assert (window.seen, window.restarts) == (4, 2)
    assert window.close().ratio == pytest.approx(whitened_ratio(arrays(rows[3:])), rel=1e-5)
    assert window.restarts == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_with_a_bad_gradient_is_left_out_and_its_displacement_too(bad):
    window, rows = GradientWindow(steps=8), walk(8)
    rows[3][1][0].fill_(bad)  # the step is skipped: the weights stay ...
    rows[4] = (rows[3][0], rows[4][1])  # ... and say nothing about a direction
    params = make()
    for weights, grads in rows:
        feed(window, params, weights, grads)
    result = window.close()
    kept = [t for i, t in enumerate(gains(rows), start=1) if i not in (3, 4)]
    finite = arrays([grads for i, (_, grads) in enumerate(rows) if i != 3])
    assert result.steps == 7
    assert result.ratio == pytest.approx(whitened_ratio(finite), rel=1e-5)
    assert result.risk_decrease == pytest.approx(sum(kept) / len(kept), rel=1e-4)


@pytest.mark.parametrize("row", [[torch.full(s, math.nan) for s in SHAPES], [None] * 3])
def test_bad_gradients_only_and_none_at_all_are_no_window(row):
    window = GradientWindow(steps=4)
    feed_gradients(window, make(), [row] * 4)
    assert window.is_full
    assert window.close() is None
    assert not window.is_full


def test_a_missing_gradient_counts_as_zero_and_none_is_written():
    params, window, rows = make(), GradientWindow(steps=4), gradients(4)
    feed_gradients(window, params, [[rows[0][0], None, rows[0][2]], *rows[1:]])
    assert all(torch.equal(p.grad, g) for p, g in zip(params, rows[3], strict=True))
    rows[0][1].zero_()
    assert window.close().ratio == pytest.approx(whitened_ratio(arrays(rows)), rel=1e-5)


def test_bfloat16_gradients_are_summed_in_float32():
    param, window = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16)), GradientWindow(600)
    for step in range(600):
        param.grad = torch.full((2,), 1.0 + (step % 2) * 2.0**-7, dtype=torch.bfloat16)
        window.add([param])
    sums = window.state_dict()["sums"]["0"]
    assert sums.dtype == torch.float32
    assert float(sums[0]) == pytest.approx(600 * (1 + 2.0**-8), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 1}, "Invalid steps: 1"),
        ({"steps": 4, "accumulator": "sketch"}, "Invalid accumulator: 'sketch'"),
    ],
)
def test_bad_arguments_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        GradientWindow(**options)


def to_complex(x):
    return torch.view_as_complex(x.contiguous())


KINDS = {
    "plain": (torch.clone, torch.clone),
    "float64": (torch.Tensor.double, torch.Tensor.double),
    "sparse": (torch.clone, lambda grad: grad.to_sparse(1)),
    "complex64": (to_complex, to_complex),
    "complex128": (lambda x: to_complex(x.double()), lambda grad: to_complex(grad.double())),
}


@both_accumulators
def test_what_is_not_fp32_is_read_as_the_fp32_that_it_equals(accumulator):
    results = []
    for make_param, make_grad in KINDS.values():
        param = torch.nn.Parameter(make_param(torch.ones(5, 3, 2)))
        window = GradientWindow(6, accumulator=accumulator)
        generator = torch.Generator().manual_seed(0)
        for _ in range(6):
            param.grad = make_grad(torch.randn(5, 3, 2, generator=generator) + 0.3)
            window.add([param])
            with torch.no_grad():
                param.sub_(0.1 * param.grad)
        found = window.close()
        results.append([found.ratio, found.ratio_se, found.risk_decrease, found.agreement])
    for name, result in zip(KINDS, results, strict=True):
        assert result == pytest.approx(results[0], rel=1e-4), name


def test_a_zero_product_of_a_step_that_moved_counts():
    p, window = torch.nn.Parameter(torch.zeros(2)), GradientWindow(4)
    for weight, grad in ((0.0, 1.0), (1.0, 0.0), (2.0, 0.0), (3.0, -6.0)):
        p.data[0], p.grad = weight, torch.tensor([grad, 1.0])
        window.add([p])
    assert window.close().risk_decrease == pytest.approx((0 + 0 + 6) / 3)


def test_fewer_than_two_terms_are_nan():
    params, window, steps = make(), GradientWindow(4), walk(2)
    for weights, grads in [steps[0]] * 3 + [steps[1]]:  # two of the weights never moved
        feed(window, params, weights, grads)
    result = window.close()
    assert math.isnan(result.risk_decrease)
    assert math.isnan(result.risk_decrease_se)


def test_large_tensors_are_scaled_up_from_the_sample():
    p, window = torch.nn.Parameter(torch.zeros(500, 400)), GradientWindow(4, accumulator="exact")
    for step in range(4):
        p.data.fill_(-float(step))
        p.grad = torch.full((500, 400), 0.5 + step)
        window.add([p])
    assert window.close().risk_decrease == pytest.approx(200_000 * 2.5, rel=1e-5)


@pytest.mark.parametrize(("steps", "windows"), [(40, 150), (71, 60), (100, 60)])
def test_the_risk_decrease_is_unbiased_and_its_error_right(steps, windows):
    """At constant slope mu in noise a step v of SGD with momentum decreases the loss by lr mu v."""
    generator = torch.Generator().manual_seed(0)
    momentum, lr, mu = 0.5, 0.1, 0.2
    p, window = torch.nn.Parameter(torch.zeros(50)), GradientWindow(steps)
    velocity, means, errors = torch.zeros(50), [], []
    while len(means) < windows:
        p.grad = mu + torch.randn(50, generator=generator)
        window.add([p])
        velocity = momentum * velocity + p.grad
        p.data.sub_(velocity, alpha=lr)
        if window.is_full:
            result = window.close()
            means.append(result.risk_decrease)
            errors.append(result.risk_decrease_se)
    reported = torch.tensor(errors[1:]).square().mean().sqrt()
    spread, mean = torch.tensor(means[1:]).std(), sum(means[1:]) / (windows - 1)
    expected = lr * 50 * mu**2 / (1 - momentum)
    assert abs(mean - expected) < 3 * spread / math.sqrt(windows)
    assert spread / math.sqrt(windows) < 0.15 * expected
    assert 0.75 < float(reported / spread) < 1.25


@both_accumulators
def test_a_long_window_measures_spread_pairs_and_reads_nothing_between_them(accumulator):
    """Of 100 steps every fourth, with the step before it; the window after it alike."""
    rows, params = walk(200), make()
    terms = [math.nan, *gains(rows)]
    agreed = [math.nan, *(float(flat(a) @ flat(b)) for (_, a), (_, b) in pairwise(rows))]
    rows[31][1][0][0, 0] = math.nan  # ends a pair
    rows[36][1][0][0, 0] = math.nan  # neither ends nor starts one
    window = GradientWindow(100, accumulator=accumulator)
    for start in (0, 100):
        for step in range(start, start + 100):
            weights, grads = rows[step]
            is_read = step % 4 >= 2
            feed(window, params, weights if is_read else [w * math.nan for w in weights], grads)
        positions = [t for t in range(start + 3, start + 100, 4) if t != 31]
        measured = window.state_dict()["agreements"].sum(1)
        assert measured[measured.isfinite()].tolist() == pytest.approx(
            [agreed[t] for t in positions], rel=1e-4, abs=1e-4
        )
        expected, result = [terms[t] for t in positions], window.close()
        assert result.risk_decrease == pytest.approx(sum(expected) / len(expected), rel=1e-4)
        lags = max(1, math.floor(4 * (len(expected) / 100) ** (2 / 9)))
        assert result.risk_decrease_se == pytest.approx(bartlett_error(expected, lags), rel=1e-4)


def test_the_risk_decrease_can_be_switched_off():
    window = GradientWindow(6, measure_risk=False)
    feed_gradients(window, make(), gradients(6))
    assert window.state_dict()["previous"] == {}
    result = window.close()
    assert math.isnan(result.risk_decrease)
    assert not math.isnan(result.ratio_se)

import copy

import pytest
import torch

from poprisk_integrations.diagnostics import GradientWindow
from poprisk_integrations.diagnostics.window_layout import LARGEST_EXACT, WindowLayout
from tests.reference.risk import (
    agreement_terms,
    bartlett_error,
    whitened_ratio,
    window_ratio,
    window_ratio_error,
)


def make():
    return [torch.nn.Parameter(torch.zeros(s)) for s in ((4, 3), (5,), (0,))]


def histories(steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(s, generator=generator) + 0.2 for s in ((4, 3), (5,), (0,))]
        for _ in range(steps)
    ]


def feed(window, params, row):
    for param, grad in zip(params, row, strict=True):
        param.grad = None if grad is None else grad.clone()
    window.add(params)


def arrays(rows):
    return [torch.stack([r[i].flatten() for r in rows]).double().numpy() for i in (0, 1)]


def twin(rows):
    return whitened_ratio(arrays(rows))


def test_equals_twin_and_starts_afresh():
    params, window, rows = make(), GradientWindow(steps=6), histories(12)
    for start in (0, 6):
        for row in rows[start : start + 6]:
            assert not window.is_full
            feed(window, params, row)
        assert window.is_full
        result = window.close()
        assert result.ratio == pytest.approx(twin(rows[start : start + 6]), rel=1e-5)
        assert result.steps == 6


@pytest.mark.parametrize("accumulator", ["exact", "sample"])
def test_error_equals_twin(accumulator):
    params, rows = make(), histories(6)
    window = GradientWindow(steps=6, accumulator=accumulator)
    for row in rows:
        feed(window, params, row)
    result = window.close()
    tensors = arrays(rows)
    assert result.ratio == pytest.approx(twin(rows), rel=1e-5)
    assert result.pooled_ratio == pytest.approx(window_ratio(tensors), rel=1e-5)
    terms = agreement_terms(tensors)
    assert result.agreement == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    assert result.agreement_se == pytest.approx(bartlett_error(terms, 2), rel=1e-4)
    assert result.ratio_se == pytest.approx(window_ratio_error(tensors), rel=1e-5)


def decide_on_device(monkeypatch):
    """The accelerator's branches on CPU tensors."""
    build = WindowLayout.__init__

    def patched(self, *args):
        build(self, *args)
        self.on_host = False

    monkeypatch.setattr(WindowLayout, "__init__", patched)


@pytest.mark.parametrize("accumulator", ["exact", "sample"])
@pytest.mark.parametrize("scale", [1.0, 0.5, torch.tensor(0.5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decision_on_the_device_equals_that_on_the_host(monkeypatch, accumulator, scale, dtype):
    rows = histories(6)
    rows[4][0][0, 0] = float("nan")
    rows[2][1] = None
    results = []
    for _ in range(2):
        params = [torch.nn.Parameter(p.detach().to(dtype)) for p in make()]
        window = GradientWindow(steps=6, accumulator=accumulator)
        for step, row in enumerate(rows):
            for p, g in zip(params, row, strict=True):
                p.grad = None if g is None else g.to(dtype)
                p.data.fill_(step * 0.25)
            window.add(params, scale=scale)
        results.append(window.close())
        decide_on_device(monkeypatch)
    host, device = results
    assert host.steps == device.steps == 5
    for name in ("ratio", "ratio_se", "risk_decrease", "risk_decrease_se", "agreement"):
        assert getattr(host, name) == pytest.approx(getattr(device, name), rel=1e-4), name
    assert torch.allclose(host.noise, device.noise, rtol=1e-5)


@pytest.mark.parametrize("accumulator", ["exact", "sample"])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_scale_undoes_clipping(accumulator, as_tensor):
    params, window, rows = make(), GradientWindow(steps=6, accumulator=accumulator), histories(6)
    for step, row in enumerate(rows):
        factor = 0.5**step
        scale = torch.tensor(1 / factor) if as_tensor else 1 / factor
        window.add(params, grads=[factor * g for g in row], scale=scale)
    result = window.close()
    assert result.ratio == pytest.approx(twin(rows), rel=1e-5)


def test_explicit_gradients_are_taken_instead_of_the_parameters():
    params, window, rows = [p.detach() for p in make()], GradientWindow(steps=6), histories(6)
    for row in rows:
        window.add(params, grads=[*row[:2], None])
    assert window.close().ratio == pytest.approx(twin(rows), rel=1e-5)
    with pytest.raises(ValueError, match="Invalid grads: 1 for 3 parameters"):
        window.add(params, grads=[None])


def test_a_window_of_several_passes_is_compared_with_the_noise_of_one():
    params, rows = make(), histories(6)
    window = GradientWindow(steps=6, epoch_steps=4)
    for row in rows:
        feed(window, params, row)
    result = window.close()
    assert result.ratio == pytest.approx(twin(rows) / 1.5, rel=1e-5)
    assert result.pooled_ratio == pytest.approx(window_ratio(arrays(rows)) / 1.5, rel=1e-5)


def test_a_gradient_that_never_changes_does_not_decide_for_all():
    """Of 17 coordinates one is constant: it counts 100, not infinity."""
    params, rows = make(), histories(12)
    for row in rows:
        row[0][0, 0] = 0.1
    window = GradientWindow(steps=12)
    for row in rows:
        feed(window, params, row)
    assert window.close().ratio < (16 * 5 + 100) / 17


def test_auto_is_exact_up_to_a_size():
    for numel, expected in ((LARGEST_EXACT, "exact"), (LARGEST_EXACT + 1, "sample")):
        param = torch.nn.Parameter(torch.empty(numel, device="meta"))
        param.grad = torch.empty(numel, device="meta")
        window = GradientWindow(steps=4)
        window.add([param])
        assert window.state_dict()["accumulator"] == expected


@pytest.mark.parametrize("accumulator", ["exact", "sample"])
def test_other_parameters_in_mid_window_start_it_afresh(accumulator):
    """Frozen, thawed, added: the run goes on, and the next whole window counts again."""
    params, window, rows = make(), GradientWindow(4, accumulator=accumulator), histories(7)
    feed(window, params, rows[0])
    for row in rows[1:3]:
        feed(window, params[:2], row[:2])
    assert (window.seen, window.restarts) == (2, 1)
    for row in rows[3:]:
        feed(window, params, row)
    assert (window.seen, window.restarts) == (4, 2)
    assert window.close().ratio == pytest.approx(twin(rows[3:]), rel=1e-5)
    assert window.restarts == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_with_a_bad_gradient_is_left_out(bad):
    params, window, rows = make(), GradientWindow(steps=7), histories(6)
    for row in [*rows[:3], [g.clone().fill_(bad) for g in rows[0]], *rows[3:]]:
        feed(window, params, row)
    result = window.close()
    assert result.steps == 6
    assert result.ratio == pytest.approx(twin(rows), rel=1e-5)


def test_only_bad_gradients_are_no_window():
    params, window = make(), GradientWindow(steps=4)
    for _ in range(4):
        feed(window, params, [torch.full_like(p, float("nan")) for p in params])
    assert window.close() is None


def test_no_gradients_are_no_window():
    params, window = make(), GradientWindow(steps=4)
    for _ in range(4):
        window.add(params)
    assert window.is_full
    assert window.close() is None
    assert not window.is_full


def test_a_missing_gradient_counts_as_zero():
    params, window, rows = make(), GradientWindow(steps=4), histories(4)
    expected = copy.deepcopy(rows)
    expected[1][1].zero_()
    rows[1][1] = None
    for row in rows:
        feed(window, params, row)
    assert window.close().ratio == pytest.approx(twin(expected), rel=1e-5)


def test_frozen_parameters_are_left_out():
    params = make()
    params[0].requires_grad_(False)
    window = GradientWindow(steps=4)
    for value in (1.0, 3.0, 3.0, 1.0):  # sum 8, variance 4/3
        params[1].grad = torch.full((5,), value)
        window.add(params)
    result = window.close()
    assert result.pooled_ratio == pytest.approx(12.0)
    assert result.ratio == pytest.approx(12.0 / 3)


def test_gradients_are_not_written():
    params, window, rows = make(), GradientWindow(steps=4), histories(1)
    feed(window, params, rows[0])
    assert all(torch.equal(p.grad, g) for p, g in zip(params, rows[0], strict=True))


def test_bfloat16_gradients_are_summed_in_float32():
    param, window = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16)), GradientWindow(600)
    for step in range(600):
        param.grad = torch.full((2,), 1.0 + (step % 2) * 2.0**-7, dtype=torch.bfloat16)
        window.add([param])
    state = window.state_dict()
    assert state["sums"]["0"].dtype == torch.float32
    assert float(state["sums"]["0"][0]) == pytest.approx(600 * (1 + 2.0**-8), rel=1e-6)


def test_no_host_sync_before_the_close():
    param = torch.nn.Parameter(torch.empty(3, device="meta"))
    window = GradientWindow(steps=4)
    for _ in range(4):
        param.grad = torch.empty(3, device="meta")
        window.add([param])  # .item(), bool() or float() of a meta tensor would raise
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        window.close()


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="Invalid steps: 1"):
        GradientWindow(steps=1)
    with pytest.raises(ValueError, match="Invalid accumulator: 'sketch'"):
        GradientWindow(steps=4, accumulator="sketch")

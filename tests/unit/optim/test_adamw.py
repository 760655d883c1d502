"""Reduction: with the gate off, or computed to one, PopRiskAdamW is torch.optim.AdamW."""

import pytest
import torch

from poprisk_integrations import PopRiskAdamW
from tests.helpers.optim_problem import feed, gradients, make_params, max_ulp, temporal, train
from tests.unit.optim.paths import EVERY, FLAGS, HOST, TORCH, launches


def adamw(impl, **kwargs):
    # torch refuses capturable=True on CPU in eager mode; its plain path is the reference there
    return lambda p: torch.optim.AdamW(p, foreach=impl == "foreach", **kwargs)


def assert_adamw(actual, expected, impl, ulps=2):
    """Bitwise where the order of operations is torch's, else near the last place of the largest."""
    if impl in HOST:
        assert max_ulp(actual, expected) == 0.0
        return
    for a, e in zip(actual, expected, strict=True):
        scale = max([0.1, *e.detach().abs().flatten().tolist()])  # some pass through zero
        eps = ulps * torch.finfo(e.dtype).eps
        torch.testing.assert_close(a, e, rtol=eps, atol=eps * scale)


OPTIONS = (
    *({}, {"weight_decay": 0.0}, {"maximize": True}, {"betas": (0.5, 0.9), "eps": 1e-3}),
    {"noise_source": "temporal"},
)
CELLS = [(impl, options, torch.float32) for impl in TORCH for options in OPTIONS]
CELLS += [(impl, {}, torch.float64) for impl in TORCH]
CELLS += [("fused_triton", {}, torch.float32)]


@pytest.mark.parametrize(("impl", "options", "dtype"), CELLS, ids=str)
def test_gate_none(impl, options, dtype):
    """Contract: bitwise on one tensor at a time, else to 2 ulp, for 100 steps, per path."""
    is_kernel = impl == "fused_triton"
    steps = 12 if is_kernel else 100  # the interpreter is slow
    theirs = {k: v for k, v in options.items() if k != "noise_source"}
    expected, reference = train(adamw(impl, lr=1e-2, **theirs), steps, dtype)
    actual, optimizer = train(
        lambda p: PopRiskAdamW(p, lr=1e-2, gate="none", **FLAGS[impl], **options), steps, dtype
    )
    assert optimizer.path == impl
    assert bool(launches) == is_kernel
    assert_adamw(actual, expected, impl)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(optimizer.state[a]["step"], reference.state[e]["step"])
        if impl in HOST:
            for key in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(optimizer.state[a][key], reference.state[e][key])


@pytest.mark.parametrize(
    "open_wide", [{"gate": "hard", "alpha": 0.0}, {"alpha": 0.0}, {"gate_blend": 0.0}], ids=str
)
@pytest.mark.parametrize("impl", TORCH)
def test_a_gate_that_computes_to_one(impl, open_wide):
    """The gate's own arithmetic must not move a bit where q = 1."""
    expected, _ = train(adamw(impl, lr=1e-2), steps=30)
    actual, _ = train(lambda p: PopRiskAdamW(p, lr=1e-2, **open_wide, **FLAGS[impl]), steps=30)
    assert_adamw(actual, expected, impl)


@pytest.mark.parametrize("impl", EVERY)
def test_a_closed_gate_only_decays(impl):
    """The control in the other direction: these tests would notice a gate that is ignored."""
    params, _ = train(
        lambda p: temporal(p, lr=1e-2, alpha=1e9, gate="hard", **FLAGS[impl]), steps=10
    )
    first, _ = train(adamw(impl, lr=1e-2), steps=1)  # ungated by definition
    torch.testing.assert_close(params[0], first[0] * (1 - 1e-4) ** 9, rtol=1e-5, atol=1e-7)
    ungated, _ = train(adamw(impl, lr=1e-2), steps=10)
    assert float((ungated[0] - params[0]).detach().abs().max()) > 0.02


@pytest.mark.parametrize("impl", TORCH)
def test_a_group_switches_the_gate_off(impl):
    gated, plain = make_params(), make_params()
    expected, _ = train(adamw(impl, lr=1e-2), steps=20)
    groups = [{"params": gated}, {"params": plain, "gate": "none"}]
    history = [row + row for row in gradients(20)]
    train(
        lambda _: PopRiskAdamW(groups, lr=1e-2, **FLAGS[impl]),
        history=history,
        params=gated + plain,
    )
    assert_adamw(plain, expected, impl)
    assert max_ulp(gated, expected) > 1e3


@pytest.mark.parametrize("impl", TORCH)
@pytest.mark.parametrize("shape", [None, (), (1,), (1, 1)], ids=str)
def test_schedules_and_tensors_as_learning_rates(impl, shape):
    """The user's tensor stays: schedulers fill it in place, graphs and users hold on to it."""

    def run(cls, lr, **kwargs):
        params = make_params()
        optimizer = cls(params, lr=lr, **kwargs)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        for row in gradients(8):
            feed(params, row)
            optimizer.step()
            scheduler.step()
        assert optimizer.param_groups[0]["lr"] is lr or not isinstance(lr, torch.Tensor)
        return params

    lr = 1e-2 if shape is None else torch.full(shape, 1e-2, dtype=torch.float64)
    expected = run(torch.optim.AdamW, 1e-2, foreach=impl == "foreach")
    assert_adamw(run(PopRiskAdamW, lr, gate="none", **FLAGS[impl]), expected, impl)
    assert shape is None or float(lr) == pytest.approx(1e-2 * 0.8**8)


def test_closure_and_complex_parameters():
    z = torch.nn.Parameter(torch.tensor([1.0 + 2.0j, -0.5j]))
    w = torch.nn.Parameter(z.detach().clone())
    ours, theirs = PopRiskAdamW([z], lr=0.1, gate="none"), torch.optim.AdamW([w], lr=0.1)

    def closure(p, optimizer):
        def call():
            optimizer.zero_grad()
            loss = (p - 1.0).abs().square().sum()
            loss.backward()
            return loss

        return call

    for _ in range(5):
        assert torch.equal(ours.step(closure(z, ours)), theirs.step(closure(w, theirs)))
    torch.testing.assert_close(z, w, rtol=1e-6, atol=1e-7)

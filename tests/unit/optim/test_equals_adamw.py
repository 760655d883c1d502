"""Reduction tests: with the gate off, PopRiskAdamW is torch.optim.AdamW."""

import pytest
import torch

from poprisk_integrations import PopRiskAdamW
from tests.helpers.optim_problem import make_params, max_ulp, train

PATHS = {
    "single_tensor": {"foreach": False},
    "foreach": {"foreach": True},
    "capturable": {"capturable": True},
}


def adamw(path, **kwargs):
    # torch refuses capturable=True on CPU in eager mode; its plain path is the reference there.
    return lambda p: torch.optim.AdamW(p, foreach=path == "foreach", **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "options",
    [{}, {"weight_decay": 0.0}, {"maximize": True}, {"betas": (0.5, 0.9), "eps": 1e-3}],
    ids=str,
)
def test_gate_none(path, dtype, options):
    expected, _ = train(adamw(path, lr=1e-2, **options), dtype=dtype)
    actual, optimizer = train(
        lambda p: PopRiskAdamW(p, lr=1e-2, gate="none", **PATHS[path], **options), dtype=dtype
    )
    assert optimizer.path == path
    if path == "capturable":  # other order of operations: scalars are on the device
        tolerance = 1e-6 if dtype == torch.float32 else 1e-14
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)
    else:
        assert max_ulp(actual, expected) == 0.0


@pytest.mark.parametrize("path", ["single_tensor", "foreach"])
def test_states_equal_too(path):
    expected, reference = train(adamw(path, lr=1e-2))
    actual, optimizer = train(lambda p: PopRiskAdamW(p, lr=1e-2, gate="none", **PATHS[path]))
    for a, e in zip(actual, expected, strict=True):
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[a][key], reference.state[e][key])


@pytest.mark.parametrize("path", ["single_tensor", "foreach"])
@pytest.mark.parametrize(
    "open_wide",
    [{"gate": "hard", "alpha": 0.0}, {"gate": "soft", "alpha": 0.0}, {"gate_blend": 0.0}],
    ids=str,
)
def test_gate_that_computes_to_one_is_bitwise_adamw(path, open_wide):
    """The gate's own arithmetic must not move a bit where q = 1."""
    expected, _ = train(adamw(path, lr=1e-2))
    actual, _ = train(lambda p: PopRiskAdamW(p, lr=1e-2, **open_wide, **PATHS[path]))
    assert max_ulp(actual, expected) == 0.0


@pytest.mark.parametrize("path", PATHS)
def test_closed_gate_only_decays(path):
    """The control in the other direction: these tests would notice a gate that is ignored."""
    params, _ = train(lambda p: PopRiskAdamW(p, lr=1e-2, alpha=1e9, gate="hard", **PATHS[path]))
    ungated, _ = train(adamw(path, lr=1e-2))
    start = make_params()
    first, _ = train(adamw(path, lr=1e-2), steps=1)
    decayed = first[0] * (1 - 1e-4) ** 99  # the first step is ungated by definition
    torch.testing.assert_close(params[0], decayed, rtol=1e-5, atol=1e-7)
    assert float((ungated[0] - start[0]).detach().abs().max()) > 0.3


def test_group_switches_the_gate_off():
    gated, plain = make_params(), make_params()
    expected, _ = train(adamw("single_tensor", lr=1e-2))

    def make(_):
        return PopRiskAdamW([{"params": gated}, {"params": plain, "gate": "none"}], lr=1e-2)

    from tests.helpers.optim_problem import gradients

    history = [row + row for row in gradients(100)]
    train(make, history=history, params=gated + plain)
    assert max_ulp(plain, expected) == 0.0
    assert max_ulp(gated, expected) > 1e3


def test_lr_scheduler_and_tensor_lr_equal_adamw():
    def run(cls, lr, **kwargs):
        from tests.helpers.optim_problem import feed, gradients

        params = make_params()
        optimizer = cls(params, lr=lr, **kwargs)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
        for row in gradients(20):
            feed(params, row)
            optimizer.step()
            scheduler.step()
        return params

    expected = run(torch.optim.AdamW, 1e-2, foreach=False)
    assert max_ulp(run(PopRiskAdamW, 1e-2, gate="none"), expected) == 0.0
    tensor_lr = run(PopRiskAdamW, torch.tensor(1e-2, dtype=torch.float64), gate="none")
    assert max_ulp(tensor_lr, expected) == 0.0


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
        a, b = ours.step(closure(z, ours)), theirs.step(closure(w, theirs))
        assert torch.equal(a, b)
    torch.testing.assert_close(z, w, rtol=1e-6, atol=1e-7)

"""Every path against a float64 twin written from the equations."""

import numpy as np
import pytest
import torch

from poprisk_integrations import PopRiskAdamW
from tests.helpers.optim_problem import feed, gradients, make_params
from tests.reference.poprisk_adamw import Twin

PATHS = {
    "single_tensor": {"foreach": False},
    "foreach": {"foreach": True},
    "capturable": {"capturable": True},
}


def compare(make, twin_options, history, rtol=1e-8, atol=1e-12):
    params = make_params(torch.float64)
    optimizer = make(params)
    twins = [Twin(p.detach().numpy(), **twin_options) for p in params]
    for row in history:
        feed(params, row)
        optimizer.step()
        for param, twin, grad in zip(params, twins, row, strict=True):
            if grad is not None:
                twin.step(grad.numpy())
            np.testing.assert_allclose(param.detach().numpy(), twin.p, rtol=rtol, atol=atol)
    for param, twin in zip(params, twins, strict=True):
        state = optimizer.state[param]
        assert (state["step"].item(), state["dev_step"].item()) == (twin.t, twin.k)
        np.testing.assert_allclose(state["exp_dev_sq"].numpy(), twin.s, rtol=rtol, atol=atol)
    return optimizer


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("options", [{}, {"alpha": 0.05}, {"lambda_pop": 1.0}], ids=str)
def test_published_rule(path, options):
    """paper(): Algorithm 1 to 1e-8 for 100 steps, the first one decided by definition."""
    twin = {"alpha": 1.0, "lambda_pop": 0.0, "gate_eps": 1e-12, "raw_mean": True, **options}
    optimizer = compare(
        lambda p: PopRiskAdamW.paper(p, lr=1e-2, **options, **PATHS[path]),
        {"lr": 1e-2, **twin},
        gradients(100, torch.float64),
    )
    assert optimizer.path == path


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gate": "hard"},
        {"gate": "snr"},
        {"gate": "snr", "lambda_pop": 3.0},
        {"alpha": 1.0},
        {"lambda_pop": 0.0},
        {"rho": 0.9, "betas": (0.8, 0.95), "eps": 1e-6},
        {"betas": (0.0, 0.99)},
        {"false_open_rate": 0.3, "weight_decay": 0.5},
    ],
    ids=str,
)
def test_default_rule(path, options):
    compare(
        lambda p: PopRiskAdamW(p, lr=1e-2, **options, **PATHS[path]),
        {"lr": 1e-2, **options},
        gradients(100, torch.float64),
    )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("raw", [True, False])
def test_blend_and_warmup(path, raw):
    options = {
        "gate_blend": 0.7,
        "gate_warmup": 5,
        "noise_mean": "raw" if raw else "bias_corrected",
    }
    compare(
        lambda p: PopRiskAdamW(p, lr=1e-2, **options, **PATHS[path]),
        {"lr": 1e-2, "blend": 0.7, "warmup": 5, "raw_mean": raw},
        gradients(20, torch.float64),
    )


@pytest.mark.parametrize("path", PATHS)
def test_alpha_finite(path):
    compare(
        lambda p: PopRiskAdamW(
            p, lr=1e-2, alpha="finite", batch_size=32, dataset_size=160, **PATHS[path]
        ),
        {"lr": 1e-2, "alpha": 0.25},
        gradients(30, torch.float64),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-9])
@pytest.mark.parametrize("path", PATHS)
def test_published_first_step_only_decays(path, scale, dtype):
    """At t = 1 s_hat = m_hat^2 by algebra; rounding must not open a single coordinate."""
    params = make_params(dtype)
    start = [p.detach().clone() for p in params]
    optimizer = PopRiskAdamW.paper(params, lr=1e-2, weight_decay=0.1, **PATHS[path])
    feed(params, gradients(1, dtype, scale=scale)[0])
    params[1].grad = torch.ones_like(params[1])
    optimizer.step()
    for param, before in zip(params, start, strict=True):
        torch.testing.assert_close(param.detach(), before * (1 - 1e-3), rtol=1e-6, atol=0)


@pytest.mark.parametrize("path", PATHS)
def test_default_first_step_is_adamw(path):
    params, reference = make_params(), make_params()
    row = gradients(1)[0]
    for group, make in ((params, PopRiskAdamW), (reference, torch.optim.AdamW)):
        kwargs = PATHS[path] if make is PopRiskAdamW else {}
        feed(group, row)
        make(group, lr=1e-2, **kwargs).step()
    for a, e in zip(params, reference, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("path", PATHS)
def test_gate_decay_decays_only_what_is_open(path):
    param = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = PopRiskAdamW(
        [{"params": [param], "gate_decay": True}], lr=0.0 + 1e-3, weight_decay=1.0, **PATHS[path]
    )
    generator = torch.Generator().manual_seed(3)
    for _ in range(300):
        noise = torch.randn(2, generator=generator, dtype=torch.float64)
        param.grad = torch.tensor([0.0, 0.0], dtype=torch.float64) + noise * 1e-3
        param.grad[1] = 1e-9  # constant: no noise, always open
        optimizer.step()
    closed_moves, open_moves = (1 - param.detach()).abs().tolist()
    assert open_moves > 3 * closed_moves


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("gate", ["soft", "hard"])
def test_preserve_norm_restores_the_norm(path, gate):
    def deltas(**kwargs):
        params = make_params(torch.float64)
        optimizer = PopRiskAdamW(params, lr=1e-2, weight_decay=0.0, **kwargs, **PATHS[path])
        moved = []
        for row in gradients(30, torch.float64):
            before = [p.detach().clone() for p in params]
            feed(params, row)
            optimizer.step()
            moved.append([(p.detach() - b) for p, b in zip(params, before, strict=True)])
        return moved

    plain = deltas(gate="none")
    kept = deltas(gate=gate, false_open_rate=0.05, preserve_norm=True)
    gated = deltas(gate=gate, false_open_rate=0.05)
    ratios, shrunk = [], []
    for a, b, c in zip(plain, kept, gated, strict=True):
        for u, v, w in zip(a, b, c, strict=True):
            if u.numel() and float(u.norm()) > 0 and float(w.norm()) > 0:
                ratios.append(float(v.norm() / u.norm()))
                shrunk.append(float(w.norm() / u.norm()))
    # Adam's directions do not depend on the parameters here, so both runs are comparable.
    assert max(ratios) == pytest.approx(1.0, rel=1e-9)
    assert min(ratios) == pytest.approx(1.0, rel=1e-9)
    assert min(shrunk) < 0.8


@pytest.mark.parametrize("path", PATHS)
def test_preserve_norm_is_finite_where_everything_is_closed(path):
    params = make_params()
    optimizer = PopRiskAdamW(
        params, lr=1e-2, gate="hard", alpha=1e30, preserve_norm=True, **PATHS[path]
    )
    for row in gradients(5):
        feed(params, row)
        optimizer.step()
    assert all(torch.isfinite(p).all() for p in params)

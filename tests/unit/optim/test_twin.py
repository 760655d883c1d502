"""Every implementation against a float64 twin written from the equations."""

import numpy as np
import pytest
import torch

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.core import moments_alpha
from tests.helpers.optim_problem import feed, gradients, make_params
from tests.reference.poprisk_adamw import Twin
from tests.unit.optim.paths import FLAGS, TORCH, launches

PUBLISHED = {"alpha": 1.0, "lambda_pop": 0.0, "gate_eps": 1e-12}
# (arguments, what the twin calls otherwise), 100 steps of the defaults and of the published rule
CASES = {
    "default": ({}, {"moments": True, "alpha": moments_alpha((0.9, 0.999), 0.3173)}),
    "temporal": ({}, {}),
    "hard": ({"gate": "hard"}, {}),
    "snr": ({"gate": "snr", "lambda_pop": 3.0}, {}),
    "alpha": ({"alpha": 1.0}, {}),
    "lambda_pop": ({"lambda_pop": 0.0}, {}),
    "decays": ({"rho": 0.9, "betas": (0.8, 0.95), "eps": 1e-6}, {}),
    "no mean": ({"betas": (0.0, 0.99)}, {}),
    "open": ({"false_open_rate": 0.3, "weight_decay": 0.5}, {}),
    "finite": ({"alpha": "finite", "batch_size": 32, "dataset_size": 160}, {"alpha": 0.25}),
    "blended": ({"gate_blend": 0.7, "gate_warmup": 5}, {"blend": 0.7, "warmup": 5}),
    "raw": (
        {"gate_blend": 0.7, "gate_warmup": 5, "noise_mean": "raw", "gate_eps": 0.0},
        {"blend": 0.7, "warmup": 5, "raw_mean": True},
    ),
    "published": (PUBLISHED, {"raw_mean": True, **PUBLISHED}),
    "published, low": (
        {**PUBLISHED, "alpha": 0.05},
        {"raw_mean": True, **PUBLISHED, "alpha": 0.05},
    ),
    "moments": ({"noise_source": "moments", "alpha": 0.1}, {"moments": True}),
    "moments, late": (
        {"noise_source": "moments", "alpha": 0.1, "gate": "snr", "gate_warmup": 5},
        {"moments": True, "warmup": 5},
    ),
    "rows": ({"granularity": "row", "alpha": 0.1}, {"grain": "row"}),
    "tensors": ({"granularity": "tensor", "alpha": 0.1, "gate": "hard"}, {"grain": "tensor"}),
    "rows, raw": (
        {"granularity": "row", "alpha": 0.2, "noise_mean": "raw", "gate_eps": 1e-3},
        {"grain": "row", "raw_mean": True},
    ),
    "rows of moments": (
        {"granularity": "row", "noise_source": "moments", "alpha": 0.1, "gate_blend": 0.7},
        {"grain": "row", "moments": True, "blend": 0.7},
    ),
    "tensors of moments": (
        {"granularity": "tensor", "noise_source": "moments", "alpha": 0.1, "weight_decay": 0.5},
        {"grain": "tensor", "moments": True},
    ),
}
NOT_THE_TWINS = ("batch_size", "dataset_size", "gate_blend", "gate_warmup", "noise_mean")
NOT_THE_TWINS += ("noise_source", "granularity")


def compare(params, twins, optimizer, history, rtol, atol):
    for row in history:
        feed(params, row)
        optimizer.step()
        for param, twin, grad in zip(params, twins, row, strict=True):
            if grad is not None:
                twin.step(grad.numpy())
            np.testing.assert_allclose(param.detach().numpy(), twin.p, rtol=rtol, atol=atol)
    for param, twin in zip(params, twins, strict=True):
        state = optimizer.state[param]
        assert state["step"].item() == twin.t
        if twin.moments:
            assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
            continue
        assert state["dev_step"].item() == twin.k
        np.testing.assert_allclose(state["exp_dev_sq"].numpy(), twin.s, rtol=rtol, atol=atol)


def twins_of(params, options, renamed):
    known = {k: v for k, v in options.items() if k not in NOT_THE_TWINS}
    return [Twin(p.detach().numpy(), **{"lr": 1e-2, **known, **renamed}) for p in params]


CELLS = [(impl, case) for impl in TORCH for case in CASES]
CELLS += [("fused_triton", case) for case in ("default", "temporal", "published", "snr")]


@pytest.mark.parametrize(("impl", "case"), CELLS)
def test_equals_the_twin(impl, case):
    """Contract: `paper()` to 1e-8 for 100 steps in float64; the kernel computes in float32."""
    options, renamed = CASES[case]
    if not renamed.get("moments"):
        options = {"noise_source": "temporal", **options}
    is_kernel = impl == "fused_triton"
    dtype = torch.float32 if is_kernel else torch.float64
    params = make_params(dtype)
    cls = PopRiskAdamW.paper if case.startswith("published") else PopRiskAdamW
    optimizer = cls(params, lr=1e-2, **options, **FLAGS[impl])
    twins = twins_of(params, options, renamed)
    steps = 12 if is_kernel else 100 if case in ("default", "temporal", "published") else 25
    rtol, atol = (2e-5, 2e-6) if is_kernel else (1e-8, 1e-12)
    compare(params, twins, optimizer, gradients(steps, dtype), rtol, atol)
    assert optimizer.path == impl
    assert bool(launches) == is_kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-9])
@pytest.mark.parametrize("impl", TORCH)
def test_the_published_first_step_only_decays(impl, scale, dtype):
    """At t = 1 s_hat = m_hat^2 by algebra; rounding must not open a single coordinate."""
    params = make_params(dtype)
    start = [p.detach().clone() for p in params]
    optimizer = PopRiskAdamW.paper(params, lr=1e-2, weight_decay=0.1, **FLAGS[impl])
    feed(params, gradients(1, dtype, scale=scale)[0])
    params[1].grad = torch.ones_like(params[1])
    optimizer.step()
    for param, before in zip(params, start, strict=True):
        torch.testing.assert_close(param.detach(), before * (1 - 1e-3), rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", TORCH)
def test_gated_decay_decays_only_what_is_open(impl):
    param = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    group = {"params": [param], "gate_decay": True}
    optimizer = PopRiskAdamW([group], lr=1e-3, weight_decay=1.0, **FLAGS[impl])
    generator = torch.Generator().manual_seed(3)
    for _ in range(200):
        param.grad = torch.randn(2, generator=generator, dtype=torch.float64) * 1e-3
        param.grad[1] = 1e-9  # constant: no noise, always open
        optimizer.step()
    closed_moves, open_moves = (1 - param.detach()).abs().tolist()
    assert open_moves > 3 * closed_moves


@pytest.mark.parametrize("gate", ["soft", "hard"])
@pytest.mark.parametrize("impl", TORCH[:3])
def test_preserve_norm_restores_the_norm(impl, gate):
    def deltas(**kwargs):
        params = make_params(torch.float64)
        optimizer = PopRiskAdamW(params, lr=1e-2, weight_decay=0.0, **kwargs, **FLAGS[impl])
        moved = []
        for row in gradients(12, torch.float64):
            before = [p.detach().clone() for p in params]
            feed(params, row)
            optimizer.step()
            moved += [float((p.detach() - b).norm()) for p, b in zip(params, before, strict=True)]
        return torch.tensor(moved)

    # Adam's directions do not depend on the parameters here, so the runs are comparable.
    plain = deltas(gate="none")
    gated = deltas(gate=gate, false_open_rate=0.05)
    kept = deltas(gate=gate, false_open_rate=0.05, preserve_norm=True)
    left = (plain > 0) & (gated > 0)
    torch.testing.assert_close(kept[left], plain[left], rtol=1e-6, atol=0)
    assert float((gated[left] / plain[left]).min()) < 0.8


@pytest.mark.parametrize("impl", TORCH[:3])
def test_preserve_norm_is_finite_where_everything_is_closed(impl):
    params = make_params()
    options = {"gate": "hard", "alpha": 1e30, "preserve_norm": True}
    optimizer = PopRiskAdamW(params, lr=1e-2, **options, **FLAGS[impl])
    for row in gradients(4):
        feed(params, row)
        optimizer.step()
    assert all(torch.isfinite(p).all() for p in params)

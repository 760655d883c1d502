"""GradScaler: eager paths never see an overflow, fused ones are told of it and unscale."""

import pytest
import torch

from poprisk_integrations import PopRiskAdamW
from tests.helpers.optim_problem import snapshot, unchanged
from tests.unit.optim.paths import FLAGS, TORCH


def run(impl, scaled, steps=6, overflow=(), **kwargs):
    """(parameter, optimizer) after a linear problem, with or without a scaler."""
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.linspace(-1, 1, 8))
    optimizer = PopRiskAdamW([param], lr=1e-2, **kwargs, **FLAGS[impl])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled, growth_interval=100)
    for step in range(steps):
        optimizer.zero_grad()
        x = torch.randn(8, generator=generator)
        if step in overflow:
            x[3] = float("inf")
            before = snapshot(optimizer)
        scaler.scale((param * x).sum()).backward()
        handed = param.grad.clone()
        scaler.step(optimizer)
        if optimizer._step_supports_amp_scaling:  # unlike torch's: gradients are never written
            assert torch.equal(param.grad, handed)
        if step in overflow:
            assert unchanged(optimizer, before) or not before[0]["state"]
        scaler.update()
    assert not hasattr(optimizer, "found_inf")
    assert not hasattr(optimizer, "grad_scale")
    return param, optimizer


@pytest.mark.parametrize("impl", TORCH)
def test_scaled_training_is_training(impl):
    """Powers of two, so that scaling and unscaling lose no bit."""
    scaled, optimizer = run(impl, scaled=True)
    plain, _ = run(impl, scaled=False)
    assert torch.equal(scaled, plain)
    assert optimizer.state[scaled]["step"].item() == 6


@pytest.mark.parametrize("impl", TORCH)
def test_an_overflow_is_not_stepped_on(impl):
    """The first step included, where no state exists yet: its count stays zero."""
    scaled, optimizer = run(impl, scaled=True, overflow=(0, 3), noise_source="temporal")
    state = optimizer.state[scaled]
    assert (state["step"].item(), state["dev_step"].item()) == (4, 3)
    assert torch.isfinite(scaled).all()
    # else the scaler does not step
    assert optimizer.skipped_nonfinite == (2 if impl == "fused_compiled" else 0)


@pytest.mark.parametrize("impl", TORCH)
def test_unscaled_by_hand_for_clipping(impl):
    """`unscale_` before the step: the optimizer must not divide a second time."""
    param = torch.nn.Parameter(torch.zeros(4))
    optimizer = PopRiskAdamW([param], lr=1e-2, **FLAGS[impl])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale((param * torch.ones(4)).sum()).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_([param], 1.0)
        scaler.step(optimizer)
        scaler.update()
    mean = 0.5 * (1 - 0.9**3)  # of gradients of norm 1
    torch.testing.assert_close(optimizer.state[param]["exp_avg"], torch.full((4,), mean))


@pytest.mark.parametrize("kwargs", [{}, {"gate": "none"}, {"preserve_norm": True}], ids=str)
@pytest.mark.parametrize("impl", TORCH)
def test_only_a_fused_path_that_was_asked_for_claims_to_unscale(impl, kwargs):
    """Lightning refuses gradient clipping where the optimizer says that it unscales."""
    optimizer = PopRiskAdamW([torch.nn.Parameter(torch.ones(4))], **kwargs, **FLAGS[impl])
    claims = getattr(optimizer, "_step_supports_amp_scaling", False)
    assert claims == optimizer.path.startswith("fused")
    amp = pytest.importorskip("lightning.fabric.plugins.precision.amp")
    assert amp._optimizer_handles_unscaling(optimizer) == claims


def test_a_fused_path_chosen_by_size_does_not_claim_it():
    """Clipping must not depend on the number of parameters."""
    big = PopRiskAdamW([torch.nn.Parameter(torch.empty(1 << 20))])
    assert big.path in ("fused_compiled", "single_tensor")  # without a compiler: the latter
    assert not getattr(big, "_step_supports_amp_scaling", False)

"""Every loss against a float64 twin, its force against autograd, and what the papers promise."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from poprisk_integrations.core import preference_forces as forces
from poprisk_integrations.core import preference_losses as losses
from tests.reference import preferences as twin

H = torch.linspace(-12, 12, 49, dtype=torch.float64)
RATES = (0.0, 0.1, 0.2, 0.3, 0.4)
W = torch.linspace(0, 1, 49, dtype=torch.float64)


def case(name: str, loss: Any, force: Any, expected: Any) -> Any:
    return pytest.param(loss, force, expected, id=name)


CASES = [
    case("dpo", losses.dpo_loss, forces.dpo_force, twin.dpo),
    *(
        case(
            f"{name}-{e}",
            partial(getattr(losses, f"{name}_dpo_loss"), noise_rate=e),
            partial(getattr(forces, f"{name}_dpo_force"), noise_rate=e),
            partial(reference, e=e),
        )
        for name, reference in (("conservative", twin.cdpo), ("robust", twin.rdpo))
        for e in RATES
    ),
    *(
        case(
            f"bounded-{e}",
            partial(losses.robust_dpo_loss, noise_rate=e, max_margin=2.25),
            partial(forces.robust_dpo_force, noise_rate=e, max_margin=2.25),
            partial(twin.bounded_rdpo, e=e, limit=2.25),
        )
        for e in RATES
    ),
    *(
        case(
            f"holder-{g}",
            partial(losses.holder_dpo_loss, gamma=g),
            partial(forces.holder_dpo_force, gamma=g),
            partial(twin.holder, g=g),
        )
        for g in (0.5, 1.0, 2.0, 6.0)
    ),
    case(
        "posterior",
        partial(losses.posterior_dpo_loss, p_correct=W),
        partial(forces.posterior_dpo_force, p_correct=W),
        partial(twin.posterior, w=W.numpy()),
    ),
]


@pytest.mark.parametrize(("loss", "force", "expected"), CASES)
def test_loss_and_force_equal_the_twin(
    loss: Callable[[Tensor], Tensor],
    force: Callable[[Tensor], Tensor],
    expected: Callable[[np.ndarray], np.ndarray],
) -> None:
    h = H.clone().requires_grad_()
    value = loss(h)
    np.testing.assert_allclose(value.detach().numpy(), expected(H.numpy()), atol=1e-12)
    (grad,) = torch.autograd.grad(value.sum(), h)
    torch.testing.assert_close(-grad, force(H), atol=1e-12, rtol=1e-9)
    np.testing.assert_allclose(force(H).numpy(), twin.slope(expected, H.numpy()), atol=1e-7)


@pytest.mark.parametrize(("loss", "force", "expected"), CASES)
def test_single_precision_is_close_and_finite_far_out(
    loss: Callable[[Tensor], Tensor], force: Callable[[Tensor], Tensor], expected: Any
) -> None:
    torch.testing.assert_close(loss(H.float()).double(), loss(H), atol=1e-4, rtol=1e-5)
    far = torch.linspace(-5e3, 5e3, 49).requires_grad_()
    value = loss(far)
    (grad,) = torch.autograd.grad(value.sum(), far)
    assert value.isfinite().all()
    assert grad.isfinite().all()


@pytest.mark.parametrize("e", RATES)
def test_robust_force_is_that_of_dpo_and_a_constant(e: float) -> None:
    push = forces.robust_dpo_force(H, e) - forces.dpo_force(H)
    torch.testing.assert_close(push, torch.full_like(H, e / (1 - 2 * e)), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("e", RATES)
def test_robust_loss_is_unbiased(e: float) -> None:
    # A label is kept with probability 1 - e, and swapped otherwise.
    expected = (1 - e) * losses.robust_dpo_loss(H, e) + e * losses.robust_dpo_loss(-H, e)
    torch.testing.assert_close(expected, losses.dpo_loss(H))


def test_robust_loss_has_no_finite_optimum_and_the_bounded_one_has_a_floor() -> None:
    far = torch.tensor([10.0, 100.0, 1000.0], dtype=torch.float64)
    assert (losses.robust_dpo_loss(far, 0.3).diff() < -50).all()
    assert losses.robust_dpo_loss(far, 0.3, 4.0).diff().abs().max() < 1e-4


@pytest.mark.parametrize(("e", "zero"), [(0.1, 2.20), (0.2, 1.39), (0.3, 0.85), (0.4, 0.41)])
def test_conservative_force_vanishes_at_the_log_odds(e: float, zero: float) -> None:
    at = math.log((1 - e) / e)
    assert at == pytest.approx(zero, abs=0.006)
    h = torch.tensor([at - 0.1, at, at + 0.1], dtype=torch.float64)
    below, on, above = forces.conservative_dpo_force(h, e).tolist()
    assert below > 1e-3
    assert on == pytest.approx(0.0, abs=1e-15)
    assert above < -1e-3


def test_without_noise_all_are_dpo() -> None:
    expected = losses.dpo_loss(H)
    assert torch.equal(losses.conservative_dpo_loss(H, 0.0), expected)
    assert torch.equal(losses.robust_dpo_loss(H, 0.0), expected)
    assert torch.equal(losses.posterior_dpo_loss(H, torch.ones_like(H)), expected)


def test_posterior_with_one_probability_is_conservative() -> None:
    w = torch.full_like(H, 0.7)
    torch.testing.assert_close(
        losses.posterior_dpo_loss(H, w), losses.conservative_dpo_loss(H, 0.3)
    )


def test_no_gradient_flows_into_the_posterior() -> None:
    h = H.clone().requires_grad_()
    w = torch.sigmoid(h)
    (grad,) = torch.autograd.grad(losses.posterior_dpo_loss(h, w).sum(), h)
    torch.testing.assert_close(-grad, forces.posterior_dpo_force(H, torch.sigmoid(H)))


@pytest.mark.parametrize("p", [0.6, 0.9])
def test_holder_is_a_proper_scoring_rule(p: float) -> None:
    expected = p * losses.holder_dpo_loss(H) + (1 - p) * losses.holder_dpo_loss(-H)
    at = math.log(p / (1 - p))
    here = torch.tensor(at, dtype=torch.float64)
    least = p * losses.holder_dpo_loss(here) + (1 - p) * losses.holder_dpo_loss(-here)
    assert (expected >= least - 1e-15).all()


def test_holder_tends_to_dpo_and_forgives_contradictions() -> None:
    torch.testing.assert_close(
        forces.holder_dpo_force(H, 1e-7), forces.dpo_force(H), atol=1e-5, rtol=0
    )
    far = torch.tensor([-30.0, -3.0, -0.5], dtype=torch.float64)
    assert (forces.holder_dpo_force(far).diff() > 0).all()
    assert forces.holder_dpo_force(far)[0] < 1e-12


@pytest.mark.parametrize("e", [-0.1, 0.5, 1.0, math.nan, math.inf])
def test_noise_rates_out_of_range(e: float) -> None:
    for loss in (losses.conservative_dpo_loss, losses.robust_dpo_loss):
        with pytest.raises(ValueError, match=r"Invalid noise_rate: .*Must be in \[0, 0.5\)"):
            loss(H, e)


def test_noise_rates_per_pair() -> None:
    e = torch.linspace(0, 0.4, 49, dtype=torch.float64)
    for loss in (losses.conservative_dpo_loss, losses.robust_dpo_loss):
        each = torch.stack([loss(h, float(rate)) for h, rate in zip(H, e, strict=True)])
        torch.testing.assert_close(loss(H, e), each)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_other_options_out_of_range(value: float) -> None:
    with pytest.raises(ValueError, match="Invalid max_margin"):
        losses.robust_dpo_loss(H, 0.3, value)
    with pytest.raises(ValueError, match="Invalid gamma"):
        losses.holder_dpo_loss(H, value)

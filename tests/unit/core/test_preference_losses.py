"""Every loss and its force against a float64 twin, and what the papers promise."""

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from poprisk_integrations.core import preference_losses as losses
from tests.reference import preferences as twin

H = torch.linspace(-12, 12, 49, dtype=torch.float64)
RATES = (0.0, 0.1, 0.2, 0.3, 0.4)
W = torch.linspace(0, 1, 49, dtype=torch.float64)

# Name -> the loss, and the same in float64 numpy.
CASES: dict[str, tuple[Any, Any]] = {
    "dpo": (losses.dpo_loss, twin.dpo),
    "posterior": (
        partial(losses.posterior_dpo_loss, p_correct=W),
        partial(twin.posterior, w=W.numpy()),
    ),
}
for e in RATES:
    CASES[f"conservative {e}"] = (
        partial(losses.conservative_dpo_loss, noise_rate=e),
        partial(twin.cdpo, e=e),
    )
    CASES[f"robust {e}"] = (
        partial(losses.robust_dpo_loss, noise_rate=e),
        partial(twin.rdpo, e=e),
    )
    CASES[f"bounded {e}"] = (
        partial(losses.robust_dpo_loss, noise_rate=e, max_margin=2.25),
        partial(twin.bounded_rdpo, e=e, limit=2.25),
    )
for g in (0.5, 1.0, 2.0, 6.0):
    CASES[f"holder {g}"] = (
        partial(losses.holder_dpo_loss, gamma=g),
        partial(twin.holder, g=g),
    )


def force(loss: Any, h: Tensor) -> Tensor:
    """-dL/dh by autograd."""
    h = h.clone().requires_grad_()
    return -torch.autograd.grad(loss(h).sum(), h)[0]


@pytest.mark.parametrize("case", CASES)
def test_loss_and_force_equal_the_twin(case: str) -> None:
    loss, expected = CASES[case]
    np.testing.assert_allclose(loss(H).numpy(), expected(H.numpy()), atol=1e-12)
    np.testing.assert_allclose(force(loss, H), twin.slope(expected, H.numpy()), atol=1e-7)
    # In single precision close, and finite far out.
    torch.testing.assert_close(loss(H.float()).double(), loss(H), atol=1e-4, rtol=1e-5)
    far = torch.linspace(-5e3, 5e3, 49)
    assert loss(far).isfinite().all()
    assert force(loss, far).isfinite().all()


@pytest.mark.parametrize("e", RATES)
def test_robust_loss_is_unbiased(e: float) -> None:
    # A label is kept with probability 1 - e, and swapped otherwise.
    expected = (1 - e) * losses.robust_dpo_loss(H, e) + e * losses.robust_dpo_loss(-H, e)
    torch.testing.assert_close(expected, losses.dpo_loss(H))


def test_robust_loss_has_no_finite_optimum_and_the_bounded_one_has_a_floor() -> None:
    far = torch.tensor([10.0, 100.0, 1000.0], dtype=torch.float64)
    assert (losses.robust_dpo_loss(far, 0.3).diff() < -50).all()
    assert losses.robust_dpo_loss(far, 0.3, 4.0).diff().abs().max() < 1e-4


@pytest.mark.parametrize("e", RATES[1:])
def test_conservative_force_vanishes_at_the_log_odds(e: float) -> None:
    h = math.log((1 - e) / e) + torch.tensor([-0.1, 0.0, 0.1], dtype=torch.float64)
    below, on, above = force(partial(losses.conservative_dpo_loss, noise_rate=e), h).tolist()
    assert below > 1e-3
    assert on == pytest.approx(0.0, abs=1e-15)
    assert above < -1e-3


def test_without_noise_all_are_dpo() -> None:
    expected = losses.dpo_loss(H)
    assert torch.equal(losses.conservative_dpo_loss(H, 0.0), expected)
    assert torch.equal(losses.robust_dpo_loss(H, 0.0), expected)
    assert torch.equal(losses.posterior_dpo_loss(H, torch.ones_like(H)), expected)


def test_no_gradient_flows_into_the_posterior() -> None:
    found = force(lambda h: losses.posterior_dpo_loss(h, torch.sigmoid(h)), H)
    torch.testing.assert_close(found, torch.zeros_like(H), atol=1e-12, rtol=0)  # w - s(h)


@pytest.mark.parametrize("p", [0.6, 0.9])
def test_holder_is_a_proper_scoring_rule(p: float) -> None:
    def expected(h: Tensor) -> Tensor:
        return p * losses.holder_dpo_loss(h) + (1 - p) * losses.holder_dpo_loss(-h)

    least = expected(torch.tensor(math.log(p / (1 - p)), dtype=torch.float64))
    assert (expected(H) >= least - 1e-15).all()


def test_holder_tends_to_dpo_and_forgives_contradictions() -> None:
    found = force(partial(losses.holder_dpo_loss, gamma=1e-7), H)
    torch.testing.assert_close(found, torch.sigmoid(-H), atol=1e-5, rtol=0)
    far = force(losses.holder_dpo_loss, torch.tensor([-30.0, -3.0, -0.5], dtype=torch.float64))
    assert (far.diff() > 0).all()
    assert far[0] < 1e-12


@pytest.mark.parametrize("loss", [losses.conservative_dpo_loss, losses.robust_dpo_loss])
def test_noise_rates(loss: Any) -> None:
    for e in (-0.1, 0.5, 1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"Invalid noise_rate: .*Must be in \[0, 0.5\)"):
            loss(H, e)
    rates = torch.linspace(0, 0.4, 49, dtype=torch.float64)
    each = torch.stack([loss(h, float(rate)) for h, rate in zip(H, rates, strict=True)])
    torch.testing.assert_close(loss(H, rates), each)  # one per pair


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_other_options_out_of_range(value: float) -> None:
    with pytest.raises(ValueError, match="Invalid max_margin"):
        losses.robust_dpo_loss(H, 0.3, value)
    with pytest.raises(ValueError, match="Invalid gamma"):
        losses.holder_dpo_loss(H, value)

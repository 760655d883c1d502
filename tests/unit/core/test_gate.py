import numpy as np
import pytest
import torch

from poprisk_integrations.core import default_lambda_pop, gate_factor, open_mask
from tests.reference.poprisk_adamw import Twin


@pytest.mark.parametrize("gate", ["soft", "hard", "snr", "none"])
@pytest.mark.parametrize(("alpha", "lambda_pop", "eps"), [(0.2, 0.2, 0.0), (1.0, 0.0, 1e-12)])
def test_gate_equals_twin(gate, alpha, lambda_pop, eps):
    mean = torch.randn(200, dtype=torch.float64)
    noise = torch.rand(200, dtype=torch.float64)
    noise[:10] = 0.0
    mean[:5] = 0.0
    twin = Twin(0.0, lr=0.0, gate=gate, alpha=alpha, lambda_pop=lambda_pop, gate_eps=eps)
    q = gate_factor(mean**2, noise, gate=gate, alpha=alpha, lambda_pop=lambda_pop, eps=eps).numpy()
    np.testing.assert_allclose(q, twin.q(mean.numpy(), noise.numpy()), rtol=1e-12)
    assert np.all((q >= 0) & (q <= 1))


def test_soft_default_is_the_positive_part_shrinker():
    ratio = torch.tensor([0.1, 0.5, 1.0, 4.0], dtype=torch.float64)
    q = gate_factor(ratio, torch.ones(4).double(), gate="soft", alpha=0.5, lambda_pop=0.5)
    torch.testing.assert_close(q, (1 - 0.5 / ratio).clamp(min=0))


def test_snr_is_half_on_the_boundary():
    q = gate_factor(torch.tensor([0.3]), torch.ones(1), gate="snr", alpha=0.3, lambda_pop=1.0)
    torch.testing.assert_close(q, torch.tensor([0.5]))


@pytest.mark.parametrize("gate", ["soft", "hard", "snr"])
def test_no_noise_is_open_and_no_gradient_is_closed(gate):
    mean_sq, noise = torch.tensor([0.0, 1e-30]), torch.zeros(2)
    q = gate_factor(mean_sq, noise, gate=gate, alpha=0.2, lambda_pop=0.2)
    assert q.tolist() == [0.0, 1.0]
    assert open_mask(mean_sq, noise, 0.2).tolist() == [False, True]


@pytest.mark.parametrize("gate", ["soft", "hard", "snr"])
def test_gate_does_not_depend_on_the_scale(gate):
    mean, noise = torch.randn(1000), torch.rand(1000)
    kwargs = {"gate": gate, "alpha": 0.2, "lambda_pop": 0.2}
    base = gate_factor(mean**2, noise, **kwargs)
    for power in (-40, 40):  # powers of two scale exactly
        scaled = gate_factor((mean * 2.0**power) ** 2, noise * 4.0**power, **kwargs)
        assert torch.equal(base, scaled)


def test_default_lambda_pop():
    assert default_lambda_pop("soft", 0.19) == 0.19
    assert default_lambda_pop("snr", 0.19) == 1.0


def test_unknown_gate_is_named():
    with pytest.raises(ValueError, match="Invalid gate: 'firm'"):
        gate_factor(torch.ones(1), torch.ones(1), gate="firm", alpha=1.0, lambda_pop=1.0)

"""What the gate does to noise, signal and the scale of the loss."""

import pytest
import torch

from poprisk_integrations import PopRiskAdamW
from tests.helpers.optim_problem import make_params

PATHS = {
    "single_tensor": {"foreach": False},
    "foreach": {"foreach": True},
    "capturable": {"capturable": True},
}


def open_fraction(mean, steps=400, burn_in=100, n=20_000, **options):
    param = torch.nn.Parameter(torch.zeros(n))
    optimizer = PopRiskAdamW([param], lr=1e-3, gate="hard", collect_stats_every=1, **options)
    generator = torch.Generator().manual_seed(5)
    fractions = []
    for step in range(steps):
        param.grad = mean + torch.randn(n, generator=generator)
        optimizer.step()
        if step >= burn_in and step % 20 == 0:
            fractions.append(float(optimizer.gate_stats()["open_fraction"]))
    return sum(fractions) / len(fractions)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rate", [0.05, 0.3])
def test_calibrated_alpha_has_its_false_open_rate(path, rate):
    fraction = open_fraction(0.0, false_open_rate=rate, **PATHS[path])
    assert fraction == pytest.approx(rate, rel=0.1)


@pytest.mark.parametrize("betas", [(0.8, 0.99), (0.95, 0.999)], ids=str)
def test_calibration_follows_beta1(betas):
    assert open_fraction(0.0, betas=betas) == pytest.approx(0.3173, rel=0.05)  # the default


def test_published_alpha_shuts_nearly_all_noise_and_half_of_unit_signal():
    assert open_fraction(0.0, alpha="fresh") < 1e-4
    assert open_fraction(1.0, alpha="fresh") == pytest.approx(0.46, abs=0.03)
    assert open_fraction(0.5, alpha="fresh") == pytest.approx(0.012, abs=0.006)


def test_finite_alpha_is_nearly_no_gate():
    fraction = open_fraction(0.0, alpha="finite", batch_size=256, dataset_size=3_840_000)
    assert fraction == pytest.approx(0.97, abs=0.01)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("gate", ["soft", "hard", "snr"])
@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_scale_of_the_loss_leaves_the_open_set(path, gate, factor):
    """Contract: times 1e-6 or 1e6 leaves the open set unchanged, Adam's eps aside."""

    def moved(scale):
        torch.manual_seed(11)
        param = torch.nn.Parameter(torch.zeros(2000, dtype=torch.float64))
        optimizer = PopRiskAdamW(
            [param], lr=1e-2, gate=gate, weight_decay=0.0, eps=0.0, **PATHS[path]
        )
        signal = torch.linspace(0, 1, 2000)
        history = []
        for _ in range(50):
            param.grad = ((signal + torch.randn(2000)).double() * scale).clone()
            before = param.detach().clone()
            optimizer.step()
            history.append(param.detach() - before)
        return torch.stack(history)

    base, scaled = moved(1.0), moved(factor)
    assert torch.equal(base != 0, scaled != 0)
    torch.testing.assert_close(base, scaled, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_zero_gradients_and_zero_lr_change_nothing(path):
    """Checkpoint templates are made with such a step."""
    params = make_params()
    start = [p.detach().clone() for p in params]
    optimizer = PopRiskAdamW(params, lr=0.0, weight_decay=0.1, **PATHS[path])
    for _ in range(3):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    for param, before in zip(params, start, strict=True):
        assert torch.equal(param, before)
        for key in ("exp_avg", "exp_avg_sq", "exp_dev_sq"):
            assert not optimizer.state[param][key].any()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("paper", [True, False])
def test_zero_gradients_give_no_nan(path, paper):
    params = make_params()
    make = PopRiskAdamW.paper if paper else PopRiskAdamW
    optimizer = make(params, lr=1e-2, **PATHS[path])
    for step in range(4):
        for p in params:
            p.grad = torch.zeros_like(p) if step < 3 else torch.ones_like(p)
        optimizer.step()
    assert all(torch.isfinite(p).all() for p in params)


@pytest.mark.parametrize("path", PATHS)
def test_gate_stats_add_up(path):
    dead, noisy, clear = (torch.nn.Parameter(torch.zeros(500)) for _ in range(3))
    optimizer = PopRiskAdamW(
        [{"params": [dead, noisy, clear]}, {"params": [torch.nn.Parameter(torch.zeros(1))]}],
        lr=1e-3,
        false_open_rate=0.05,
        collect_stats_every=10,
        **PATHS[path],
    )
    assert optimizer.gate_stats() == {}
    generator = torch.Generator().manual_seed(0)
    for _ in range(201):
        dead.grad = torch.zeros(500)
        noisy.grad = torch.randn(500, generator=generator)
        clear.grad = 1 + 0.01 * torch.randn(500, generator=generator)
        optimizer.step()
    stats = {k: float(v) for k, v in optimizer.gate_stats().items()}
    assert stats["closed_zero_grad"] == pytest.approx(1 / 3)
    assert stats["open_fraction"] == pytest.approx((0.05 + 1) / 3, abs=0.015)
    assert stats["closed_noise"] == pytest.approx(0.95 / 3, abs=0.015)
    total = stats["open_fraction"] + stats["closed_zero_grad"] + stats["closed_noise"]
    assert total == pytest.approx(1.0)
    assert 0.9 < stats["update_norm_ratio"] <= 1.0
    assert stats["effective_lr"] == pytest.approx(1e-3 * stats["update_norm_ratio"], rel=1e-5)
    assert 1 / 3 < stats["mean_gate"] < stats["open_fraction"]
    assert stats["skipped_nonfinite"] == 0
    assert "group0/open_fraction" in stats
    assert "group1/open_fraction" not in stats

    # Sums of two ranks that hold the same replica give the same ratios.
    twice = optimizer.gate_stats(optimizer.gate_sums() * 2)
    assert {k: float(v) for k, v in twice.items()} == pytest.approx(stats)


@pytest.mark.parametrize("path", PATHS)
def test_sampling_does_not_change_the_run(path):
    from tests.helpers.optim_problem import train

    plain, _ = train(lambda p: PopRiskAdamW(p, lr=1e-2, **PATHS[path]), steps=20)
    sampled, optimizer = train(
        lambda p: PopRiskAdamW(p, lr=1e-2, collect_stats_every=3, **PATHS[path]), steps=20
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, sampled, strict=True))
    assert optimizer.gate_stats()

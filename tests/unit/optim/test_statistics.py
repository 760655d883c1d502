"""What the gate does to noise, signal and the scale of the loss."""

import pytest
import torch

from poprisk_integrations import PopRiskAdamW
from tests.helpers.optim_problem import feed, gradients, make_params, train
from tests.unit.optim.paths import FLAGS, TORCH

TEMPORAL = {"noise_source": "temporal"}


@pytest.mark.parametrize(
    ("options", "signal", "share", "tolerance"),
    [
        # contract: within 10 % of the rate that was asked for, whatever beta1
        ({"false_open_rate": 0.05}, 0.0, 0.05, 0.005),
        ({"false_open_rate": 0.3}, 0.0, 0.3, 0.03),
        ({"false_open_rate": 0.05, **TEMPORAL}, 0.0, 0.05, 0.005),
        ({"false_open_rate": 0.3, **TEMPORAL}, 0.0, 0.3, 0.03),
        ({"betas": (0.8, 0.99)}, 0.0, 0.3173, 0.016),
        ({"betas": (0.95, 0.999)}, 0.0, 0.3173, 0.016),
        ({"betas": (0.8, 0.99), **TEMPORAL}, 0.0, 0.3173, 0.016),
        ({"betas": (0.95, 0.999), **TEMPORAL}, 0.0, 0.3173, 0.016),
        # the published boundary shuts nearly all noise, and half of unit signal
        ({"alpha": "fresh", **TEMPORAL}, 0.0, 0.0, 1e-4),
        ({"alpha": "fresh", **TEMPORAL}, 0.5, 0.012, 0.006),
        ({"alpha": "fresh", **TEMPORAL}, 1.0, 0.46, 0.03),
        # nearly no gate
        ({"alpha": "finite", "batch_size": 256, "dataset_size": 3_840_000}, 0.0, 0.97, 0.01),
    ],
    ids=str,
)
def test_share_of_noisy_coordinates_that_are_open(options, signal, share, tolerance):
    param = torch.nn.Parameter(torch.zeros(10_000))
    optimizer = PopRiskAdamW([param], lr=1e-3, gate="hard", collect_stats_every=1, **options)
    generator = torch.Generator().manual_seed(5)
    fractions = []
    for step in range(250):
        param.grad = signal + torch.randn(10_000, generator=generator)
        optimizer.step()
        if step >= 100 and step % 20 == 0:
            fractions.append(float(optimizer.gate_stats()["open_fraction"]))
    assert sum(fractions) / len(fractions) == pytest.approx(share, abs=tolerance)


@pytest.mark.parametrize("impl", TORCH)
@pytest.mark.parametrize("gate", ["soft", "hard", "snr"])
def test_scale_of_the_loss_leaves_the_open_set(impl, gate):
    """Contract: times 1e-6 or 1e6 leaves the open set unchanged, Adam's eps aside."""

    def moved(scale):
        torch.manual_seed(11)
        param = torch.nn.Parameter(torch.zeros(2000, dtype=torch.float64))
        optimizer = PopRiskAdamW(
            [param], lr=1e-2, gate=gate, weight_decay=0.0, eps=0.0, **FLAGS[impl]
        )
        signal = torch.linspace(0, 1, 2000)
        history = []
        for _ in range(50):
            param.grad = ((signal + torch.randn(2000)).double() * scale).clone()
            before = param.detach().clone()
            optimizer.step()
            history.append(param.detach() - before)
        return torch.stack(history)

    base = moved(1.0)
    for scaled in (moved(1e-6), moved(1e6)):
        assert torch.equal(base != 0, scaled != 0)
        torch.testing.assert_close(base, scaled, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("impl", TORCH)
def test_gate_stats_add_up(impl):
    dead, noisy, clear = (torch.nn.Parameter(torch.zeros(500)) for _ in range(3))
    optimizer = PopRiskAdamW(
        [{"params": [dead, noisy, clear]}, {"params": [torch.nn.Parameter(torch.zeros(1))]}],
        lr=1e-3,
        false_open_rate=0.05,
        collect_stats_every=10,
        **FLAGS[impl],
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


@pytest.mark.parametrize("impl", TORCH)
def test_sampling_does_not_change_the_run(impl):
    plain, _ = train(lambda p: PopRiskAdamW(p, lr=1e-2, **FLAGS[impl]), steps=10)
    params, sampled_at = make_params(), []
    optimizer = PopRiskAdamW(params, lr=1e-2, collect_stats_every=3, **FLAGS[impl])
    for step, row in enumerate(gradients(10)):
        before = optimizer.gate_sums()
        feed(params, row)
        optimizer.step()
        if not torch.equal(optimizer.gate_sums(), before):
            sampled_at.append(step)
    assert sampled_at == [0, 3, 6, 9]
    assert all(torch.equal(a, b) for a, b in zip(plain, params, strict=True))

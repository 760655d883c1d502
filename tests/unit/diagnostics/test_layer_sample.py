"""Statistics by layer against float64 arithmetic written out, and against the optimizer's sums."""

import math

import pytest
import torch

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.diagnostics.layer_sample import LAYER_STATISTICS, LayerSample

B1, B2, RHO, EPS, LR = 0.9, 0.99, 0.95, 1e-8, 1e-2
PATHS = {
    "single_tensor": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "capturable": {"capturable": True},
    "bfloat16": {"state_dtype": "bfloat16"},
}
TEMPORAL = {"noise_source": "temporal"}
NAMES = ("layers.0.w", "layers.0.b", "layers.1.w", "head.w")
SHAPES = ((6, 5), (6,), (4, 6), (3, 4))


def gradients(count, seed=0, signal=0.3):
    generator = torch.Generator().manual_seed(seed)
    means = [signal * torch.randn(s, generator=generator) for s in SHAPES]
    for _ in range(count):
        grads = [m + torch.randn(m.shape, generator=generator) for m in means]
        grads[2][0] = 0
        yield grads


def steps(count, **options):
    """(optimizer, sample) after each step."""
    params = [torch.nn.Parameter(torch.zeros(s)) for s in SHAPES]
    settings = {"lr": LR, "betas": (B1, B2), "rho": RHO, "eps": EPS, "collect_stats_every": 1}
    optimizer = PopRiskAdamW(params, **{**settings, **options})
    sample = LayerSample(optimizer, zip(NAMES, params, strict=True), True)
    for grads in gradients(count):
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        sample.before_step()
        optimizer.step()
        sample.after_step()
        yield optimizer, sample


def run(count, **options):
    *_, (optimizer, sample) = steps(count, **options)
    return optimizer, sample.metrics(sample.sums())


def twin(steps):
    """{layer: statistics} and the predicted decrease, one coordinate at a time in Python floats."""
    alpha = (1 - B1) / 2 * 1.0000  # the default rate is that of one sigma
    coordinates = {}
    history = [[g.double().flatten().tolist() for g in grads] for grads in gradients(steps)]
    decrease = 0.0
    for which, name in enumerate(NAMES):
        layer = name.rsplit(".", 1)[0]
        for k in range(len(history[0][which])):
            m = v = s = 0.0
            u = q = 0.0
            for t in range(1, steps + 1):
                g = history[t - 1][which][k]
                if t == steps:
                    decrease += LR * q * u * g
                if t > 1:
                    s = RHO * s + (1 - RHO) * (g - m / (1 - B1 ** (t - 1))) ** 2
                m = B1 * m + (1 - B1) * g
                v = B2 * v + (1 - B2) * g * g
                m_hat, v_hat = m / (1 - B1**t), v / (1 - B2**t)
                s_hat = s / (1 - RHO ** (t - 1)) if t > 1 else 0.0
                u = m_hat / (math.sqrt(v_hat) + EPS)
                q = 1.0
                if t > 1:
                    q = max(0.0, 1 - alpha * s_hat / m_hat**2) if m_hat else 0.0
            c = (1 - B1) / (1 + B1) * (1 + B1**steps) / (1 - B1**steps)
            noise = c * s_hat * (1 + B1) / 2 / (math.sqrt(v_hat) + EPS) ** 2
            is_open = m_hat**2 > alpha * s_hat
            row = (is_open, q, u, q * u, m_hat == 0, noise)
            coordinates.setdefault(layer, []).append(row)
    expected = {}
    every = [row for some in coordinates.values() for row in some]
    for layer, rows in {**coordinates, "": every}.items():
        n = len(rows)
        share_open, share_dead = sum(r[0] for r in rows) / n, sum(r[4] for r in rows) / n
        ungated = sum(r[2] ** 2 for r in rows)
        stats = {
            "open_fraction": share_open,
            "mean_gate": sum(r[1] for r in rows) / n,
            "update_norm_ratio": math.sqrt(sum(r[3] ** 2 for r in rows) / ungated),
            "closed_zero_grad": share_dead,
            "closed_noise": 1 - share_open - share_dead,
            "signal_to_noise": ungated / sum(r[5] for r in rows) - 1,
        }
        if not layer:
            stats = {"signal_to_noise": stats["signal_to_noise"], "predicted_decrease": decrease}
        expected |= {f"{layer}/{name}".lstrip("/"): x for name, x in stats.items()}
    return expected


@pytest.mark.parametrize("path", PATHS)
def test_agrees_with_the_twin(path):
    optimizer, metrics = run(12, **TEMPORAL, **PATHS[path])
    assert optimizer.path == ("single_tensor" if path == "bfloat16" else path)
    expected = twin(12)
    assert set(metrics) == set(expected)
    digits = {"rel": 0.1, "abs": 0.05} if path == "bfloat16" else {"rel": 2e-4, "abs": 1e-6}
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, **digits), name
    assert 0 < expected["layers.1/closed_zero_grad"] < 1  # the case occurs


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gate": "hard", "gate_blend": 0.5},
        {"gate": "snr", "gate_eps": 1e-3, "noise_mean": "raw", **TEMPORAL},
        {"maximize": True, "gate_warmup": 4},
        {"gate_warmup": 6},
        {"gate": "none"},
        {"noise_mean": "raw", "gate_eps": 0.0, "alpha": 1.0, "lambda_pop": 0.0},  # the paper's
        TEMPORAL,
        {"granularity": "row", **TEMPORAL},
        {"granularity": "tensor", "gate": "snr"},
    ],
    ids=str,
)
def test_layers_add_up_to_the_sums_of_the_step(options):
    for optimizer, sample in steps(6, foreach=False, fused=False, **options):
        total = optimizer.gate_sums()[0, :8].double()
        torch.testing.assert_close(sample.sums().sum(0)[:8], total, rtol=1e-5, atol=1e-6)


def test_large_tensors_are_sampled_and_weighted_up():
    generator = torch.Generator().manual_seed(3)
    param = torch.nn.Parameter(torch.zeros(120, 100))
    optimizer = PopRiskAdamW([param], collect_stats_every=1, foreach=False, fused=False)
    sample = LayerSample(optimizer, [("w", param)], True)
    for _ in range(8):
        param.grad = torch.randn(120, 100, generator=generator) + 0.2
        sample.before_step()
        optimizer.step()
        sample.after_step()
    exact, metrics = optimizer.gate_stats(), sample.metrics(sample.sums())
    assert sample.sums()[0, 0] == 12_000
    for name in LAYER_STATISTICS:
        assert metrics[f"w/{name}"] == pytest.approx(float(exact[name]), abs=0.05), name
    assert metrics["w/open_fraction"] != float(exact["open_fraction"])  # a sample it is


@pytest.mark.parametrize("source", ["temporal", "moments"])
def test_noise_has_no_signal_and_signal_has_its_own(source):
    """The sums are unbiased: 0 for noise; for a mean of mu sigmas, mu^2 over the EMA's variance."""
    for mean, low, high in ((0.0, -0.05, 0.05), (0.5, 4.4, 5.1)):  # 0.25 * 19 = 4.75
        found = []
        param = torch.nn.Parameter(torch.zeros(2000))
        optimizer = PopRiskAdamW([param], noise_source=source)
        sample = LayerSample(optimizer)
        generator = torch.Generator().manual_seed(1)
        for step in range(300):
            param.grad = mean + torch.randn(2000, generator=generator)
            optimizer.step()
            if step >= 200 and step % 10 == 0:
                sample.after_step()
                found.append(sample.metrics(sample.sums())["signal_to_noise"])
        assert low < sum(found) / len(found) < high


def test_predicted_decrease_is_what_one_more_step_takes_off_the_loss():
    """On noise the gate selects what looks like signal; a fresh batch is not taken in."""
    generator = torch.Generator().manual_seed(2)
    mean = torch.zeros(2000)
    mean[:200] = 0.5
    param = torch.nn.Parameter(torch.zeros(2000))
    optimizer = PopRiskAdamW([param], lr=1e-3, weight_decay=0.0)
    sample = LayerSample(optimizer)
    found, true, in_sample = [], [], []
    moved = exp_avg = torch.zeros(2000)  # by and at the last step
    for _ in range(200):
        param.grad = mean + torch.randn(2000, generator=generator)
        true.append(float(moved @ mean))
        in_sample.append(float(moved @ exp_avg))
        before = param.detach().clone()
        sample.before_step()
        optimizer.step()
        sample.after_step()
        moved = before - param.detach()
        exp_avg = optimizer.state[param]["exp_avg"].clone()
        found.append(sample.metrics(sample.sums()).get("predicted_decrease", 0.0))
    assert sum(found) == pytest.approx(sum(true), rel=0.05)
    assert sum(in_sample) > 1.3 * sum(true)  # what a plug-in of the mean would have said


def test_what_is_unknown_is_left_out():
    _, first = run(1)
    assert not any("signal_to_noise" in name or name == "predicted_decrease" for name in first)
    assert first["head/open_fraction"] == 1.0
    _, ungated = run(3, gate="none")
    assert not any("signal_to_noise" in name for name in ungated)
    optimizer = PopRiskAdamW([torch.nn.Parameter(torch.zeros(3))])
    sample = LayerSample(optimizer)
    sample.before_step()
    sample.after_step()
    assert sample.metrics(sample.sums()) == {}
    for value in (1.0, 1.0, float("nan")):
        optimizer.param_groups[0]["params"][0].grad = torch.full((3,), value)
        sample.before_step()
        optimizer.step()
        sample.after_step()
    assert "predicted_decrease" not in sample.metrics(sample.sums())


def test_complex_8bit_empty_and_ungrouped_parameters():
    params = [
        torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64)),
        torch.nn.Parameter(torch.zeros(64, 64)),
        torch.nn.Parameter(torch.zeros(0)),
        torch.nn.Parameter(torch.zeros(2, dtype=torch.float64)),
    ]
    optimizer = PopRiskAdamW(params, state_dtype="8bit", collect_stats_every=1)
    sample = LayerSample(optimizer, [("a.c", params[0])], True)
    generator = torch.Generator().manual_seed(4)
    for _ in range(5):
        for p in params:
            p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)
        sample.before_step()
        optimizer.step()
        sample.after_step()
    assert sample.sums()[:, 0].tolist() == [6, 4098]
    assert optimizer.gate_sums()[0, 0] == 4104
    metrics = sample.metrics(sample.sums())
    assert all(math.isfinite(value) for value in metrics.values())

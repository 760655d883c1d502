"""noise_source="microbatch" on one process: the variance, rescaling and skips."""

import copy

import numpy as np
import pytest
import torch
from scipy.stats import norm, t
from torch import nn

from poprisk_integrations import PopRiskAdamW
from tests.helpers.gradient_pieces import (
    BETA1,
    RHO,
    SETTINGS,
    assert_close,
    backward,
    noise,
    pieces,
    take_step,
)
from tests.helpers.optim_problem import make_params
from tests.unit.optim.paths import FLAGS, TORCH


class VarianceTwin:
    """s_t = rho s + (1 - rho) Var 2/(1+beta1), with Var from the definition in float64."""

    def __init__(self, shapes):
        self.s = [np.zeros(shape) for shape in shapes]

    def step(self, rows):
        count = len(rows)
        for i, s in enumerate(self.s):
            if all(row[i] is None for row in rows):
                continue
            y = np.stack(
                [np.zeros(s.shape) if r[i] is None else r[i].double().numpy() for r in rows]
            )
            variance = count * y.var(axis=0, ddof=1)  # of the sum of `count` pieces
            self.s[i] = RHO * s + (1 - RHO) * variance * 2 / (1 + BETA1)


def clipped(params):
    """A factor that the optimizer is not told of."""
    length = float(nn.utils.clip_grad_norm_(params, max_norm=0.5))
    assert length > 0.5
    return 0.5 / length


def check(params, history, scale=1.0, between=lambda params: 1.0, rtol=2e-5, **options):
    """Steps whose pieces are the rows of `history`, rescaled `between` backward and step."""
    optimizer = PopRiskAdamW(params, **SETTINGS, **options)
    twin = VarianceTwin([p.shape for p in params])
    for rows in history:
        optimizer.zero_grad()
        for row in rows:
            backward(params, row, scale)
        factor = scale * between(params)
        optimizer.step()
        twin.step([[None if g is None else factor * g.double() for g in row] for row in rows])
    found = [s / scale**2 for s in noise(optimizer, params)]
    assert_close(found, [s / scale**2 for s in twin.s], rtol)
    return optimizer


@pytest.mark.parametrize("impl", TORCH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.2, 1e-12, 1e12])
def test_equals_the_twin(impl, dtype, scale):
    """Whether or not the trainer divides by the number of passes: pieces are what it adds."""
    params = make_params(dtype)
    rtol = 1e-12 if dtype == torch.float64 else 2e-5
    optimizer = check(params, pieces(6, count=5, dtype=dtype), scale, rtol=rtol, **FLAGS[impl])
    counts = [float(optimizer.state[p]["dev_step"]) for p in params if p.numel()]
    assert counts == [6.0] * len(counts)


def of_few_rows(rows):
    """Pieces with a signal in some rows of a matrix and nothing in the others."""
    generator = torch.Generator().manual_seed(0)
    history = [[[torch.zeros(1000, 3)] for _ in range(3)] for _ in range(2)]
    for step in history:
        for (piece,) in step:
            piece[rows] = torch.randn(piece[rows].shape, generator=generator)
    return history


@pytest.mark.parametrize(
    ("history", "rtol"),
    [
        (pieces(steps=4, count=4), 2e-5),
        # themselves rounded to 8 bits, once per accumulation and once clipped
        (pieces(steps=4, count=4, dtype=torch.bfloat16), 5e-2),
        # padding comes first in many vocabularies: coordinates are looked at all over the rows
        (of_few_rows(slice(60, None)), 1e-4),
    ],
    ids=["float32", "bfloat16", "late rows"],
)
def test_clipping_by_norm_rescales_the_noise_alike(history, rtol):
    params = [nn.Parameter(torch.zeros_like(g)) for g in history[0][1]]
    check(params, history, between=clipped, rtol=rtol)


def test_where_nothing_is_seen_of_the_scale_it_is_one():
    check([nn.Parameter(torch.zeros(1000, 3))], of_few_rows(slice(1, 2)))


@pytest.mark.parametrize("impl", TORCH)
@pytest.mark.parametrize("warmup", [0, 3])
def test_the_gate_starts_at_the_same_step_as_the_temporal_one(impl, warmup):
    for source in ("temporal", "microbatch"):
        param = nn.Parameter(torch.zeros(50))
        options = {**SETTINGS, "noise_source": source, "gate_warmup": warmup, "alpha": 1e6}
        optimizer = PopRiskAdamW([param], **options, **FLAGS[impl], weight_decay=0.0)
        moved = []
        for _ in range(6):
            before = param.detach().clone()
            take_step(optimizer, [param], torch.randn(2, 1, 50))
            moved.append(not torch.equal(before, param))  # alpha=1e6: an active gate is closed
        assert moved == [t <= max(warmup, 1) for t in range(1, 7)], source


@pytest.mark.parametrize(("count", "rho"), [(16, 0.99), (2, 0.99), (2, 0.9)])
def test_share_of_pure_noise_that_passes(count, rho):
    """With many pieces it is `false_open_rate`; with few, s is noisy and a little more passes.

    s averages (1+rho)/(1-rho) steps of N-1 degrees of freedom each, so m_hat / sqrt(s_hat) has
    about the tails of Student's t: 5.1 % for two pieces at rho=0.99, 6.5 % at rho=0.9.
    Sampling error: 4000 coordinates, m_hat of 150 steps as good as 8 independent ones: 0.12 %.
    """
    param = nn.Parameter(torch.zeros(4000))
    options = {**SETTINGS, "lr": 0.0, "rho": rho, "gate": "hard", "collect_stats_every": 1}
    optimizer = PopRiskAdamW([param], false_open_rate=0.05, **options)
    generator = torch.Generator().manual_seed(5)
    passed = []
    for step in range(250):
        take_step(optimizer, [param], torch.randn(count, 1, 4000, generator=generator))
        if step >= 100:
            passed.append(float(optimizer.gate_stats()["open_fraction"]))
    freedom = (count - 1) * (1 + rho) / (1 - rho)
    expected = 2 * t.sf(norm.isf(0.025), freedom)
    assert np.mean(passed) == pytest.approx(expected, abs=0.0036)


def test_a_loss_scaler_is_unscaled_and_its_overflow_leaves_nothing():
    """GradScaler does not call step() on overflow: the next step must not see those pieces."""
    params = make_params()
    optimizer = PopRiskAdamW(params, **SETTINGS)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=1)
    twin = VarianceTwin([p.shape for p in params])
    for step, rows in enumerate(pieces(steps=5, count=3)):
        optimizer.zero_grad(set_to_none=True)
        if step == 2:
            rows[1][0][0, 0] = float("inf")
        for row in rows:
            loss = sum((p * g).sum() for p, g in zip(params, row, strict=True) if g is not None)
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(params, max_norm=1e9)
        scaler.step(optimizer)
        scaler.update()
        if step != 2:
            twin.step(rows)
    assert optimizer.state[params[0]]["step"].item() == 4
    assert_close(noise(optimizer, params), twin.s)


@pytest.mark.parametrize("impl", TORCH)
def test_a_skipped_step_leaves_no_trace(impl):
    def run(poison):
        params = make_params()
        optimizer = PopRiskAdamW(params, **SETTINGS, **FLAGS[impl])
        for step, rows in enumerate(pieces(steps=4, count=3)):
            for bad in (poison[step], None) if step in poison else (None,):
                optimizer.zero_grad(set_to_none=False)  # nothing but the reset can forget pieces
                for row in rows:
                    backward(params, row)
                if bad is not None:
                    params[0].grad[1, 2] = bad
                optimizer.step()
        return [*params, *noise(optimizer, params)], optimizer

    clean, _ = run({})
    skipped, optimizer = run({0: float("nan"), 2: float("inf")})
    assert all(torch.equal(a, b) for a, b in zip(clean, skipped, strict=True))
    assert optimizer.skipped_nonfinite == 2


def test_a_stale_overflow_does_not_reach_s():
    """A trainer that keeps zeroed gradients after an overflow leaves infinite pieces behind."""
    param = nn.Parameter(torch.zeros(40))
    optimizer = PopRiskAdamW([param], **SETTINGS)
    for step in range(3):
        if param.grad is not None:
            param.grad.zero_()
        for _ in range(2):
            backward([param], [torch.randn(40)])
        if step == 1:  # the overflow, after which step() is not called
            backward([param], [torch.full((40,), float("inf"))])
            param.grad.zero_()
            backward([param], [torch.randn(40)])
        optimizer.step()
    assert torch.isfinite(optimizer.state[param]["exp_dev_sq"]).all()
    assert optimizer.state[param]["dev_step"].item() == 2


def test_a_parameter_used_twice_in_a_pass_is_one_piece():
    tied = nn.Parameter(torch.zeros(30))
    twin = nn.Parameter(torch.zeros(30))
    optimizer = PopRiskAdamW([tied], **SETTINGS)
    reference = PopRiskAdamW([twin], **SETTINGS)
    for _ in range(3):
        a, b = torch.randn(30), torch.randn(30)
        ((tied * a).sum() + (tied * b).sum()).backward()
        backward([twin], [a + b])
    optimizer.step()
    reference.step()
    assert_close(noise(optimizer, [tied]), noise(reference, [twin]))


def test_complex_parameters_have_noise_per_component():
    param = nn.Parameter(torch.zeros(20, dtype=torch.complex64))
    parts = nn.Parameter(torch.zeros(20, 2))
    optimizer = PopRiskAdamW([param, parts], **SETTINGS)
    for _ in range(3):
        y = torch.randn(20, 2)
        (torch.view_as_real(param) * y).sum().backward()
        (parts * y).sum().backward()
    optimizer.step()
    of_complex, of_parts = noise(optimizer, [param, parts])
    torch.testing.assert_close(torch.view_as_real(of_complex), of_parts)


def test_channels_last_gradients():
    model = nn.Conv2d(3, 20, 3).to(memory_format=torch.channels_last)
    twin = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    results = []
    for net, layout in ((model, torch.channels_last), (twin, torch.contiguous_format)):
        optimizer = PopRiskAdamW(net.parameters(), **SETTINGS)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            x = torch.randn(2, 3, 6, 6, generator=generator).to(memory_format=layout)
            net(x).square().mean().backward()
        optimizer.step()
        results.append(noise(optimizer, list(net.parameters())))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-9)

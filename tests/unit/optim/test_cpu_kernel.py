"""fused=True on CPU: what the kernel computes, for plans that the matrix leaves out."""

import pytest
import torch

from poprisk_integrations import PopRiskAdamW
from tests.helpers.optim_problem import feed, snapshot, temporal, train, unchanged
from tests.unit.optim.paths import FLAGS, needs_compiler

pytestmark = needs_compiler
FUSED = {"fused": True}
F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


def assert_close(actual, expected, ulps):
    """Within some units of the last place of each tensor's largest element."""
    for a, e in zip(actual, expected, strict=True):
        if e.numel():
            scale = float(e.detach().abs().max())
            assert float((a - e).detach().abs().max()) <= ulps * torch.finfo(e.dtype).eps * scale


PLANS = [
    ({}, F32),
    ({"gate": "snr", "gate_blend": 0.7, "state_dtype": "bfloat16"}, BF16),
    ({"gate": "hard", "gate_decay": True, "maximize": True}, F64),
    ({"gate": "none"}, F32),
    ({"gate": "none", "gate_decay": True, "noise_source": "moments"}, F64),
    ({"state_dtype": "8bit"}, F32),
    ({"state_dtype": "8bit"}, BF16),
    ({"state_dtype": "8bit", "granularity": "tensor"}, F32),
    ({"state_dtype": {"exp_avg": "bfloat16", "exp_dev_sq": "8bit"}}, BF16),
    ({"stochastic_rounding": False, "rounding_seed": 3}, BF16),
    ({"capturable": True}, F32),
    ({"gate_warmup": 5}, F32),
    ({"gate_eps": 1e-12, "noise_mean": "raw", "alpha": 0.5}, F32),
    ({"granularity": "row", "gate": "hard", "gate_decay": True}, F32),
]
PLANS = [({"noise_source": "temporal", **options}, dtype) for options, dtype in PLANS]
PLANS += [(o | {"noise_source": "moments"}, d) for o, d in PLANS if o.get("noise_mean") != "raw"]


@pytest.mark.parametrize(("options", "dtype"), PLANS, ids=str)
def test_equals_the_eager_path(options, dtype):
    options = {"lr": 1e-2, "collect_stats_every": 1, **options}
    (params, fused), (expected, eager) = (
        train(lambda p, flag=flag: PopRiskAdamW(p, fused=flag, **options), 20, dtype)
        for flag in (True, False)
    )
    assert fused.path == "fused_compiled"
    assert eager.path == ("capturable" if options.get("capturable") else "single_tensor")
    # bfloat16 parameters: the draws are the same, so the rounded values are
    assert_close(params, expected, ulps=0 if dtype == BF16 else 2)
    for name, value in eager.gate_stats().items():
        assert float(fused.gate_stats()[name]) == pytest.approx(float(value), rel=1e-5), name
    for a, b in zip(fused.state.values(), eager.state.values(), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-5, atol=1e-9, msg=key)


LARGE = [{}, {"granularity": "row"}, {"state_dtype": "8bit"}, {"noise_source": "temporal"}]


@pytest.mark.parametrize("shape", [(70, 1003), (3, 40_000), (100_001,), (64, 64)], ids=str)
@pytest.mark.parametrize("options", LARGE, ids=str)
def test_tensors_larger_than_a_chunk(shape, options):
    """Whatever ends where a chunk, a buffer or a block of codes does not."""

    def run(fused):
        generator = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter(torch.randn(shape, generator=generator))
        optimizer = PopRiskAdamW([p], collect_stats_every=1, fused=fused, **options)
        for _ in range(3):
            p.grad = torch.randn(shape, generator=generator) + 0.5
            optimizer.step()
        return p, optimizer

    (p, fused), (q, eager) = run(True), run(False)
    # a draw next to a threshold may give the next code
    has_codes = options.get("state_dtype") == "8bit" and len(shape) > 1
    torch.testing.assert_close(p, q, rtol=1e-5, atol=2e-5 if has_codes else 1e-6)
    codes = {k: (fused.state[p][k], v) for k, v in eager.state[q].items() if k.endswith("codes")}
    assert bool(codes) == has_codes
    for ours, theirs in codes.values():
        assert (ours != theirs).float().mean() < 1e-3
    for name, value in eager.gate_stats().items():
        assert float(fused.gate_stats()[name]) == pytest.approx(float(value), rel=1e-3), name


@pytest.mark.parametrize("noise_source", ["temporal", "moments"])
@pytest.mark.parametrize("state_dtype", [None, "bfloat16", "8bit"])
def test_the_number_of_threads_is_not_seen(noise_source, state_dtype):
    """Bit for bit, statistics included."""
    runs = []
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            generator = torch.Generator().manual_seed(0)
            shapes = [(300, 517), (7,), (41, 1000), (65, 64)] * 2
            params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
            options = {"noise_source": noise_source, "state_dtype": state_dtype}
            optimizer = PopRiskAdamW(params, collect_stats_every=1, **options, **FUSED)
            for _ in range(3):
                feed(params, [torch.randn(s, generator=generator) for s in shapes])
                optimizer.step()
        finally:
            torch.set_num_threads(before)
        runs.append((params, optimizer))
    (one, first), (three, second) = runs
    assert all(map(torch.equal, one, three))
    for a, b in zip(first.state.values(), second.state.values(), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert first.gate_stats() == second.gate_stats()


@pytest.mark.parametrize("noise_source", ["temporal", "moments"])
def test_without_a_gate_the_states_are_those_of_adamw(noise_source):
    """Bit for bit where torch multiplies and adds at once, as processors of today do."""
    (ours, optimizer), (theirs, adamw) = (
        train(make, 20)
        for make in (
            lambda p: PopRiskAdamW(p, lr=1e-2, gate="none", noise_source=noise_source, **FUSED),
            lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
        )
    )
    assert_close(ours, theirs, ulps=2)
    for p, q in zip(ours, theirs, strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            values = optimizer.state[p][key], adamw.state[q][key]
            assert_close([values[0]], [values[1]], ulps=1)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, 5e18])
@pytest.mark.parametrize("where", [0, 70_000, 99_999], ids=str)
def test_one_bad_element_among_many_changes_nothing(poison, where):
    """In each part of the look at gradients; a parameter of another group stays too."""
    small, large = torch.nn.Parameter(torch.ones(5)), torch.nn.Parameter(torch.ones(100_000))
    optimizer = PopRiskAdamW([{"params": [small]}, {"params": [large]}], **FUSED)
    for step in range(3):
        small.grad, large.grad = torch.ones(5), torch.ones(100_000)
        if step == 2:
            large.grad[where] = poison
            before = snapshot(optimizer)
        optimizer.step()
    assert unchanged(optimizer, before)
    assert optimizer.skipped_nonfinite == 1
    large.grad[where] = -4e18  # large, but its square is not too large
    optimizer.step()
    assert optimizer.skipped_nonfinite == 1
    assert torch.isfinite(large).all()


def test_what_the_kernel_cannot_take_is_stepped_beside_it():
    """Elements with gaps, gradients that are not what memory holds, and tensors of other kinds."""

    class Other(torch.Tensor):
        pass

    def run(flags):
        generator = torch.Generator().manual_seed(0)
        gaps = torch.randn(6, 10, generator=generator)[:, ::2]
        values = [gaps, torch.randn(7, generator=generator).as_subclass(Other)]
        values += [torch.randn(4, 3, generator=generator) for _ in range(3)]
        params = [torch.nn.Parameter(value) for value in values]
        optimizer = PopRiskAdamW(params, lr=1e-2, **flags)
        for _ in range(4):
            grads = [torch.randn(p.shape, generator=generator) for p in params]
            grads[2] = torch._neg_view(grads[2])
            grads[3] = grads[3][:1].expand(4, 3)
            feed(params, grads)
            optimizer.step()
        assert optimizer.path == ("fused_compiled" if flags["fused"] else "single_tensor")
        return [p.detach().as_subclass(torch.Tensor) for p in params]

    for a, b in zip(run(FUSED), run(FLAGS["single_tensor"]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_counts_of_parameters_that_miss_a_step_are_their_own():
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    optimizer = temporal(params, **FUSED)
    for step in range(4):
        for i, param in enumerate(params):
            param.grad = torch.ones(3) if step >= i else None
        optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in params] == [4, 3, 2]
    assert [int(optimizer.state[p]["dev_step"]) for p in params] == [3, 2, 1]

"""fused=True on CPU: one compiled pass per parameter, the numbers of the single-tensor path."""

import shutil
import warnings

import pytest
import torch

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.optim import _fused_compiled as module
from tests.helpers.optim_problem import feed, gradients, make_params, train

needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler"
)


def assert_close(actual, expected, ulps):
    """Within some units of the last place of each tensor's largest element."""
    for a, e in zip(actual, expected, strict=True):
        if e.numel():
            scale = float(e.detach().abs().max())
            assert float((a - e).detach().abs().max()) <= ulps * torch.finfo(e.dtype).eps * scale


@needs_compiler
@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.float32),
        ({"gate": "hard", "gate_decay": True, "maximize": True}, torch.float64),
        ({"gate": "snr", "gate_blend": 0.7, "state_dtype": "bfloat16"}, torch.bfloat16),
        pytest.param({"state_dtype": "8bit"}, torch.float32, marks=pytest.mark.slow),
        pytest.param({"state_dtype": "8bit"}, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param({"capturable": True}, torch.float32, marks=pytest.mark.slow),
        pytest.param({"gate_eps": 1e-12, "alpha": 0.5}, torch.float32, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_equals_the_single_tensor_path(options, dtype):
    runs = []
    for fused in (True, False):
        params, optimizer = train(
            lambda p, fused=fused: PopRiskAdamW(
                p, lr=1e-2, fused=fused, collect_stats_every=1, **options
            ),
            steps=20,
            dtype=dtype,
        )
        runs.append((params, optimizer))
    (params, fused), (expected, single) = runs
    assert fused.path == "fused_compiled"
    assert single.path in ("single_tensor", "capturable")
    # bfloat16 parameters: the draws are the same, so the rounded values are
    assert_close(params, expected, ulps=0 if dtype == torch.bfloat16 else 2)
    # taken from the states as they are stored
    digits = {None: 1e-5, "bfloat16": 2e-3, "8bit": 3e-2}[options.get("state_dtype")]
    for name, value in single.gate_stats().items():
        assert float(fused.gate_stats()[name]) == pytest.approx(float(value), rel=digits), name
    for a, b in zip(fused.state.values(), single.state.values(), strict=True):
        assert (a["step"], a["dev_step"]) == (b["step"], b["dev_step"])


@needs_compiler
def test_large_tensors_are_shared_by_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        runs = []
        for fused in (True, False):
            generator = torch.Generator().manual_seed(0)
            p = torch.nn.Parameter(torch.randn(300, 333, generator=generator))
            optimizer = PopRiskAdamW([p], lr=1e-2, fused=fused)
            for _ in range(5):
                p.grad = torch.randn(300, 333, generator=generator)
                optimizer.step()
            runs.append([p])
        assert module._is_parallel(p)
    finally:
        torch.set_num_threads(threads)
    assert_close(*runs, ulps=2)


@needs_compiler
def test_statistics_of_large_tensors_are_sampled():
    stats = []
    for fused in (True, False):
        generator = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter(torch.zeros(600, 512))
        optimizer = PopRiskAdamW([p], fused=fused, collect_stats_every=1)
        for _ in range(8):
            # columns differ, so that a sample of few of them would be seen
            signal = torch.linspace(0, 2, 512)
            p.grad = torch.randn(600, 512, generator=generator) + signal
            optimizer.step()
        stats.append(optimizer.gate_stats())
        assert optimizer.gate_sums()[0, 0] == p.numel()
    for name in ("open_fraction", "mean_gate", "update_norm_ratio"):
        assert float(stats[0][name]) == pytest.approx(float(stats[1][name]), rel=0.02), name
        assert float(stats[0][name]) != float(stats[1][name])


@needs_compiler
def test_without_a_gate_it_is_adamw():
    expected, _ = train(lambda p: torch.optim.AdamW(p, lr=1e-2), steps=100)
    actual, optimizer = train(lambda p: PopRiskAdamW(p, lr=1e-2, gate="none", fused=True))
    assert optimizer.path == "fused_compiled"
    assert_close(actual, expected, ulps=2)


@needs_compiler
def test_one_compilation_serves_all_shapes_and_scalars():
    from torch._dynamo.utils import counters

    def run(shapes, steps, lr):
        params = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
        optimizer = PopRiskAdamW(params, fused=True, lr=lr)
        for _ in range(steps):
            optimizer.param_groups[0]["lr"] *= 0.9
            feed(params, [torch.randn(s) for s in shapes])
            optimizer.step()

    run([(4, 6)], 1, 1e-3)
    before = counters["stats"]["unique_graphs"]
    run([(3, 3), (512, 4), (7,), (2, 3, 4, 5), (1000, 1)], 4, 2e-3)
    assert counters["stats"]["unique_graphs"] == before


@needs_compiler
def test_other_memory_layouts():
    """channels_last is dense and flattens; a strided view is left to the eager path."""
    base = torch.randn(4, 6, 5, 5)
    layouts = [
        base.clone().contiguous(memory_format=torch.channels_last),
        torch.randn(10, 8)[:, ::2],
        torch.randn(6, 5).t(),
    ]
    results = []
    for fused in (True, False):
        params = [torch.nn.Parameter(t.clone(memory_format=torch.preserve_format)) for t in layouts]
        params[1].data = layouts[1].clone().as_strided((10, 4), (4, 1)).t().contiguous().t()
        optimizer = PopRiskAdamW(params, lr=1e-2, fused=fused)
        generator = torch.Generator().manual_seed(3)
        for _ in range(5):
            feed(params, [torch.randn(p.shape, generator=generator) for p in params])
            optimizer.step()
        results.append(params)
    assert_close(*results, ulps=2)


@needs_compiler
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")
def test_grad_scaler_hands_over_scale_and_overflow():
    """As torch's fused optimizers, except that gradients are never written."""
    runs = []
    for fused in (True, False):
        params = make_params()
        optimizer = PopRiskAdamW(params, lr=1e-2, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
        assert optimizer._step_supports_amp_scaling == fused
        for t, row in enumerate(gradients(8)):
            scale = scaler.get_scale()
            scaler.scale(torch.ones(()))  # as a training step does
            feed(params, [None if g is None else g * scale for g in row])
            if t == 4:
                params[0].grad[0, 0] = torch.inf
                before = [p.detach().clone() for p in params]
                state = {k: v.clone() for k, v in optimizer.state[params[0]].items()}
            handed = [None if p.grad is None else p.grad.clone() for p in params]
            scaler.step(optimizer)
            if t == 4:
                assert all(map(torch.equal, params, before))
                for name, value in state.items():
                    assert torch.equal(optimizer.state[params[0]][name], value), name
            if fused:
                for p, g in zip(params, handed, strict=True):
                    assert p.grad is None or torch.equal(p.grad, g)
            scaler.update()
        runs.append(params)
        assert optimizer.skipped_nonfinite == (1 if fused else 0)  # else the scaler does not step
    assert_close(*runs, ulps=2)


def test_what_is_picked_by_default(monkeypatch):
    monkeypatch.setattr(module, "_failures", [])
    monkeypatch.setattr(module.shutil, "which", lambda _: "/usr/bin/g++")
    small, large = torch.nn.Parameter(torch.zeros(8)), torch.nn.Parameter(torch.zeros(1 << 20))
    assert PopRiskAdamW([small]).path == "single_tensor"
    assert PopRiskAdamW([large]).path == "fused_compiled"
    assert PopRiskAdamW([large], fused=False).path == "single_tensor"
    assert PopRiskAdamW([large], foreach=True).path == "foreach"
    assert PopRiskAdamW([large], preserve_norm=True).path == "single_tensor"
    assert PopRiskAdamW([small], fused=True).path == "fused_compiled"


def test_without_a_compiler_one_warning_and_the_eager_path(monkeypatch):
    monkeypatch.setattr(module, "_failures", [])
    monkeypatch.setattr(module.shutil, "which", lambda _: None)
    optimizer = PopRiskAdamW(make_params(), fused=True)
    with pytest.warns(UserWarning, match=r"none of the C\+\+ compilers"):
        assert optimizer.path == "single_tensor"
    assert optimizer.path == "single_tensor"  # no second warning: it would be an error
    assert not optimizer._step_supports_amp_scaling
    large = PopRiskAdamW([torch.nn.Parameter(torch.zeros(1 << 20))])
    assert large.path == "single_tensor"


def test_a_failing_compiler_loses_no_step(monkeypatch):
    monkeypatch.setattr(module, "_failures", [])
    monkeypatch.setattr(module, "_compiled", module._compiled.__wrapped__)

    def fails(*_, **__):
        raise RuntimeError("no space left\non device")

    monkeypatch.setattr(module.torch, "compile", lambda *_, **__: fails)
    monkeypatch.setattr(module.shutil, "which", lambda _: "/usr/bin/g++")
    expected, _ = train(lambda p: PopRiskAdamW(p, fused=False), steps=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        actual, optimizer = train(lambda p: PopRiskAdamW(p, fused=True), steps=3)
    assert [str(w.message) for w in caught if "fused=True" in str(w.message)] == [
        "PopRiskAdamW(fused=True) steps without compilation, which failed: no space left"
    ]
    assert optimizer.path == "single_tensor"
    assert all(map(torch.equal, actual, expected))

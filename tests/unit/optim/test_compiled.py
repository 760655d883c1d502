"""fused=True on CPU, really compiled: once per dtype by default, other plans are slow ones.

What the compiled function computes is tested uncompiled, in `test_matrix.py` and elsewhere.
"""

import shutil

import pytest
import torch

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.optim import _compiled
from tests.helpers.optim_problem import feed, train
from tests.unit.optim.paths import FLAGS

pytestmark = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler"
)


def assert_close(actual, expected, ulps):
    """Within some units of the last place of each tensor's largest element."""
    for a, e in zip(actual, expected, strict=True):
        if e.numel():
            scale = float(e.detach().abs().max())
            assert float((a - e).detach().abs().max()) <= ulps * torch.finfo(e.dtype).eps * scale


PLANS = [
    # one for each dtype, and one whose elements threads share
    ({}, torch.float32),
    ({"gate": "snr", "gate_blend": 0.7, "state_dtype": "bfloat16"}, torch.bfloat16),
    ({"threads": 2}, torch.float32),
    ({"gate": "hard", "gate_decay": True, "maximize": True}, torch.float64),
    ({"gate": "none"}, torch.float32),
    ({"state_dtype": "8bit"}, torch.float32),
    ({"state_dtype": "8bit"}, torch.bfloat16),
    ({"capturable": True}, torch.float32),
    ({"gate_eps": 1e-12, "noise_mean": "raw", "alpha": 0.5}, torch.float32),
]


@pytest.mark.parametrize(
    ("options", "dtype"),
    [pytest.param(*p, marks=[pytest.mark.slow] if i > 1 else []) for i, p in enumerate(PLANS)],
    ids=str,
)
def test_equals_the_eager_path(options, dtype, monkeypatch):
    options = {"lr": 1e-2, "collect_stats_every": 1, **options}
    if "threads" in options:
        threads = options.pop("threads")
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        monkeypatch.setattr(_compiled, "PARALLEL_NUMEL", 2)
    (params, fused), (expected, eager) = (
        train(lambda p, flag=flag: PopRiskAdamW(p, fused=flag, **options), 20, dtype)
        for flag in (True, False)
    )
    assert fused.path == "fused_compiled"
    assert eager.path == ("capturable" if options.get("capturable") else "single_tensor")
    # bfloat16 parameters: the draws are the same, so the rounded values are
    assert_close(params, expected, ulps=0 if dtype == torch.bfloat16 else 2)
    # taken from the states as they are stored
    digits = {None: 1e-5, "bfloat16": 2e-3, "8bit": 3e-2}[options.get("state_dtype")]
    for name, value in eager.gate_stats().items():
        assert float(fused.gate_stats()[name]) == pytest.approx(float(value), rel=digits), name
    for a, b in zip(fused.state.values(), eager.state.values(), strict=True):
        assert (a["step"], a["dev_step"]) == (b["step"], b["dev_step"])


def test_one_compilation_serves_all_shapes_and_scalars():
    """A ninth shape would hit the recompilation limit, a hard error with fullgraph."""
    from torch._dynamo.utils import counters

    def run(shapes, steps, flags):
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.ones(s)) for s in shapes]
        optimizer = PopRiskAdamW(params, lr=1e-2, **flags)
        for _ in range(steps):
            optimizer.param_groups[0]["lr"] *= 0.9  # nor may a scheduler compile anew
            feed(params, [torch.randn(s, generator=generator) for s in shapes])
            optimizer.step()
        assert optimizer.path == ("fused_compiled" if flags["fused"] else "single_tensor")
        return params

    run([(4, 6)], 1, {"fused": True})
    before = counters["stats"]["unique_graphs"]
    shapes = [(5,), (7, 3), (2, 3, 4), (1, 9), (64,), (8, 8), (3, 1, 5), (512, 4), (1000, 1), ()]
    params = run(shapes, 4, {"fused": True})
    assert counters["stats"]["unique_graphs"] == before > 0
    for param, twin in zip(params, run(shapes, 4, FLAGS["single_tensor"]), strict=True):
        torch.testing.assert_close(param, twin, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", ["fused_compiled"])
def test_statistics_of_large_tensors_are_sampled(impl):
    stats = []
    for flags in (FLAGS[impl], FLAGS["single_tensor"]):
        generator = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter(torch.zeros(600, 512))
        optimizer = PopRiskAdamW([p], collect_stats_every=1, **flags)
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

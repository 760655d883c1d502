"""noise_source="microbatch" on the fused path, with the gradients still scaled."""

import shutil

import pytest
import torch

from poprisk_integrations import PopRiskAdamW

needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler"
)


def train(*, fused, scaled):
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8)
    optimizer = PopRiskAdamW(model.parameters(), lr=1e-2, noise_source="microbatch", fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
    for _ in range(6):
        for _ in range(4):
            x = torch.randn(16, 8)
            scaler.scale((model(x) - x).square().mean() / 4).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    state = optimizer.state[model.weight]
    return optimizer.path, model.weight.detach(), state["exp_dev_sq"], state["dev_step"]


@needs_compiler
@pytest.mark.parametrize("scaled", [False, True])
def test_fused_equals_single_tensor(scaled):
    expected_path, *expected = train(fused=False, scaled=False)
    path, *actual = train(fused=True, scaled=scaled)
    assert (expected_path, path) == ("single_tensor", "fused_compiled")
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-7)
    assert bool((actual[1] > 0).all())

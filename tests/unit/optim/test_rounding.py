"""bfloat16 parameters: unbiased rounding, the same on every replica and after a resume."""

import pytest
import torch

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.optim._rounding import (
    global_index,
    hash32,
    round_to_bfloat16_,
    rounding_key,
    uniform16,
)

PATHS = {
    "single_tensor": {"foreach": False},
    "foreach": {"foreach": True},
    "capturable": {"capturable": True},
}


def rounded(source, step=1, position=0):
    target = torch.empty_like(source, dtype=torch.bfloat16)
    key = rounding_key(torch.tensor(float(step)), position, 0)
    draw = uniform16(global_index(target, target), key, "param")
    round_to_bfloat16_(target, source, draw)
    return target


def test_unbiased():
    source = torch.full((200_000,), 1.0 + 0.3 * 2**-7)  # 30 % of the way to the next bfloat16
    up = float((rounded(source) > 1.0).float().mean())
    assert up == pytest.approx(0.3, abs=0.005)
    assert float(rounded(source).double().mean()) == pytest.approx(float(source[0]), rel=1e-4)


def test_neighbours_only_and_exact_values_stay():
    source = torch.randn(10_000)
    error = (rounded(source).float() - source).abs()
    assert bool((error <= source.abs() * 2**-7).all())
    exact = source.bfloat16().float()
    assert torch.equal(rounded(exact).float(), exact)


def test_draws_depend_on_step_position_and_element_but_on_nothing_else():
    source = torch.full((4096,), 1.0 + 0.5 * 2**-7)
    base = rounded(source)
    torch.manual_seed(1234)  # no generator's state matters
    assert torch.equal(base, rounded(source))
    for other in (rounded(source, step=2), rounded(source, position=1)):
        assert float((base == other).float().mean()) == pytest.approx(0.5, abs=0.05)
    assert float((base[1:] == base[:-1]).float().mean()) == pytest.approx(0.5, abs=0.05)


def test_hash_is_the_published_one():
    """A few values of lowbias32, computed with Python integers."""

    def reference(x):
        x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
        x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
        return x ^ (x >> 16)

    values = [0, 1, 2, 12345, 2**31 - 1, 2**31, 2**32 - 1]
    words = hash32(torch.tensor(values).to(torch.int32))
    assert [word % 2**32 for word in words.tolist()] == [reference(v) for v in values]


@pytest.mark.parametrize("path", PATHS)
def test_small_updates_survive(path):
    """lr * decay and lr * update are below half an ulp: nearest rounding would lose them all."""

    def final(stochastic):
        torch.manual_seed(0)
        param = torch.nn.Parameter(torch.ones(4000, dtype=torch.bfloat16))
        optimizer = PopRiskAdamW(
            [param], lr=1e-4, gate="none", stochastic_rounding=stochastic, **PATHS[path]
        )
        for _ in range(100):
            param.grad = torch.ones_like(param)
            optimizer.step()
        return float(param.detach().float().mean())

    assert final(stochastic=True) == pytest.approx(1 - 100 * 1e-4, abs=5e-4)
    assert final(stochastic=False) == 1.0


def test_paths_round_alike():
    def final(path):
        param = torch.nn.Parameter(torch.linspace(-1, 1, 500).bfloat16())
        optimizer = PopRiskAdamW([param], lr=1e-2, **PATHS[path])
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            param.grad = torch.randn(500, generator=generator).bfloat16()
            optimizer.step()
        return param.detach()

    base = final("single_tensor")
    for path in ("foreach", "capturable"):
        # Another order of operations may move a value across a rounding threshold now and then.
        assert float((base != final(path)).float().mean()) < 0.02, path


def test_nan_stays_nan():
    """Also the pattern of all ones, which the sum would carry over to zero."""
    source = torch.tensor([0x7FFFFFFF, 0x7FC00000, -1], dtype=torch.int32).view(torch.float32)
    target = torch.zeros(3, dtype=torch.bfloat16)
    round_to_bfloat16_(target, source, torch.full((3,), 65535, dtype=torch.int32))
    assert target.isnan().all()

"""Sizes and magnitudes at which careless arithmetic breaks."""

import pytest
import torch

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.optim._rounding import round_to_bfloat16_, rounding_key, uniform16
from tests.unit.optim.torch_generic.optimizer_info import EAGER, IMPLEMENTATIONS, flags, needs_cuda


@pytest.mark.parametrize("impl", EAGER)
def test_decay_below_half_an_ulp_survives_in_bfloat16(impl):
    """Pitfall 15: lr * weight_decay = 1e-4 is far below 2^-9; nearest rounding loses it all."""

    def mean_after(steps, **kwargs):
        param = torch.nn.Parameter(torch.full((10_000,), 1.5, dtype=torch.bfloat16))
        optimizer = PopRiskAdamW(
            [param], lr=1e-3, weight_decay=0.1, **kwargs, **IMPLEMENTATIONS[impl]
        )
        for _ in range(steps):
            param.grad = torch.zeros_like(param)
            optimizer.step()
        return float(param.detach().double().mean())

    expected = 1.5 * (1 - 1e-4) ** 60
    assert mean_after(60) == pytest.approx(expected, abs=5e-4)
    assert mean_after(60, stochastic_rounding=False) == 1.5


def lowbias32(x):
    """The published hash in Python integers."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
    x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
    return x ^ (x >> 16)


@pytest.mark.parametrize("start", [0, 2**31 - 3, 2**32 - 3, 2**33 + 2**31 - 3], ids=str)
def test_draws_beyond_32_bits_of_elements(start):
    """Pitfall 16: an element's number is taken modulo 2^32, without sign and without overflow."""
    numbers = [start + i for i in range(6)]
    index = torch.tensor(numbers, dtype=torch.int64).to(torch.int32)
    key = rounding_key(torch.tensor(7.0), position=2, seed=0)
    draw = uniform16(index, key, "param")
    word = int(key) % 2**32
    assert draw.tolist() == [lowbias32((n % 2**32) ^ word) & 0xFFFF for n in numbers]
    source = torch.full((6,), 1.0 + 0.5 * 2**-7)
    target = torch.empty(6, dtype=torch.bfloat16)
    round_to_bfloat16_(target, source, draw)
    ups = [1.0 + 2**-7 if d >= 0x8000 else 1.0 for d in draw.tolist()]
    assert target.tolist() == ups


@needs_cuda
@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("impl", ["capturable", "fused"])
def test_more_than_2_to_the_31_elements(impl):
    """Pitfall 16: the last elements of a huge tensor are stepped as the first."""
    numel = 2**31 + 16
    if torch.cuda.mem_get_info()[0] < 120e9:
        pytest.skip("needs 120 GB of free device memory")
    param = torch.nn.Parameter(torch.ones(numel, dtype=torch.bfloat16, device="cuda"))
    options = {"lr": 0.5, "stochastic_rounding": False, "state_dtype": "bfloat16"}
    optimizer = PopRiskAdamW([param], **options, **flags(impl, "cuda"))
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert param[:4].tolist() == param[-4:].tolist()
    assert param[0].item() < 0.6


def test_many_shapes_share_one_compilation():
    """Pitfall 12: a ninth shape would hit the recompilation limit, a hard error with fullgraph."""
    from torch._dynamo.utils import counters

    options, graphs = flags("fused"), []
    shapes = [(5,), (7, 3), (2, 3, 4), (1, 9), (64,), (8, 8), (3, 1, 5), (11,), (13, 2), (17,), ()]
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    twins = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = PopRiskAdamW(params, lr=1e-2, **options)
    reference = PopRiskAdamW(twins, lr=1e-2, **flags("single_tensor"))
    assert optimizer.path == "fused_compiled"
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        for group in (optimizer.param_groups[0], reference.param_groups[0]):
            group["lr"] = 1e-2 / (1 + step)  # a scheduler must not recompile either
        for param, twin in zip(params, twins, strict=True):
            param.grad = torch.randn(param.shape, generator=generator)
            twin.grad = param.grad.clone()
        before = counters["stats"]["unique_graphs"]
        optimizer.step()
        graphs.append(counters["stats"]["unique_graphs"] - before)
        reference.step()
    assert graphs[0] <= 2
    assert graphs[1:] == [0, 0, 0]
    assert counters["stats"]["unique_graphs"] > 0  # it is counted at all
    assert optimizer.path == "fused_compiled"  # it did not fall back on the way
    for param, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(param, twin, rtol=1e-5, atol=1e-6)

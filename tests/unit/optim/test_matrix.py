"""Every implementation against the single-tensor one: dtypes, devices, layouts."""

import pytest
import torch

from poprisk_integrations import PopRiskAdamW
from tests.helpers.optim_problem import make_params
from tests.unit.optim.paths import EAGER, EVERY, FLAGS, TORCH, launches, needs_cuda

F32, F64, BF16, C64 = torch.float32, torch.float64, torch.bfloat16, torch.complex64
# Other orders of operations; bfloat16 parameters may round to the neighbour (2^-7 apart).
TOLERANCES = {
    F32: {"rtol": 2e-5, "atol": 2e-6},
    F64: {"rtol": 1e-11, "atol": 1e-13},
    BF16: {"rtol": 2**-7, "atol": 1e-3},
    C64: {"rtol": 2e-5, "atol": 2e-6},
}
KERNEL = (F32, BF16)  # what the kernel takes; others it leaves to `capturable`
CELLS = [
    (impl, dtype, "cpu")
    for impl in EVERY
    for dtype in (KERNEL if impl == "fused_triton" else TOLERANCES)
]
CELLS += [
    pytest.param(impl, dtype, "cuda", marks=needs_cuda)
    for impl, dtypes in (("capturable", TOLERANCES), ("fused_triton", KERNEL))
    for dtype in dtypes
]


def draw(shape, dtype, generator):
    values = torch.randn(shape, generator=generator, dtype=F64)
    if dtype.is_complex:
        values = torch.complex(values, torch.randn(shape, generator=generator, dtype=F64))
    return values.to(dtype)


TEMPORAL = {"noise_source": "temporal"}
# Noise with a state and gates of rows and tensors, where the paths differ in how they get there.
SOURCES = {
    "temporal": TEMPORAL,
    "rows": {"granularity": "row", **TEMPORAL},
    "tensors": {"granularity": "tensor", "gate": "snr", "gate_decay": True, **TEMPORAL},
    "rows of moments": {"granularity": "row", "gate_blend": 0.5},
    "tensors, norm": {"granularity": "tensor", "preserve_norm": True, "state_dtype": "bfloat16"},
    "bfloat16": {"state_dtype": "bfloat16"},
    "temporal, bfloat16": {"state_dtype": "bfloat16", **TEMPORAL},
}


def run(dtype, device, steps=8, **kwargs):
    """(parameters, optimizer) after some steps; now and then a parameter has no gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = [tuple(p.shape) for p in make_params()] * 2
    params = [torch.nn.Parameter(draw(s, dtype, generator).to(device)) for s in shapes]
    options = {"lr": 1e-2, "weight_decay": 0.1, "collect_stats_every": 1}
    optimizer = PopRiskAdamW(params, **options, **kwargs)
    generator.manual_seed(1)
    for step in range(steps):
        for i, param in enumerate(params):
            grad = draw(param.shape, dtype, generator).to(device) + 0.3
            param.grad = None if (step + i) % 4 == 0 else grad
        optimizer.step()
    return params, optimizer


def assert_same(actual, expected, dtype):
    for a, e in zip(actual[0], expected[0], strict=True):
        torch.testing.assert_close(a.cpu(), e, **TOLERANCES[dtype])
        for key, value in expected[1].state[e].items():
            given = actual[1].state[a][key].cpu()
            assert given.dtype == value.dtype
            tolerance = TOLERANCES[F32 if dtype == BF16 != value.dtype else dtype]
            torch.testing.assert_close(given, value, **tolerance, msg=key)
    ours, theirs = (optimizer.gate_stats() for _, optimizer in (actual, expected))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=3e-2 if dtype == BF16 else 1e-5, atol=0)


@pytest.mark.parametrize(("impl", "dtype", "device"), CELLS, ids=str)
def test_matches_the_single_tensor_path(impl, dtype, device):
    actual = run(dtype, device, **FLAGS[impl])
    expected = run(dtype, "cpu", **FLAGS["single_tensor"])
    assert expected[1].path == "single_tensor"
    assert actual[1].path == impl
    assert bool(launches) == (impl == "fused_triton" and device == "cpu")
    assert_same(actual, expected, dtype)


@pytest.mark.parametrize("case", SOURCES)
@pytest.mark.parametrize("dtype", [F32, BF16, C64], ids=str)
@pytest.mark.parametrize("impl", EVERY[1:])
def test_every_source_and_grain_matches_too(impl, dtype, case):
    """The kernel takes both sources; gates of rows and tensors it leaves to `capturable`."""
    if impl == "fused_triton" and dtype not in KERNEL:
        pytest.skip("the kernel takes float32 and bfloat16")
    options = SOURCES[case]
    actual = run(dtype, "cpu", **options, **FLAGS[impl])
    expected = run(dtype, "cpu", **options, **FLAGS["single_tensor"])
    is_kernel = impl == "fused_triton" and "granularity" not in options
    assert bool(launches) == is_kernel
    assert_same(actual, expected, BF16 if "bfloat16" in str(options) else dtype)
    keys = {"step", "exp_avg", "exp_avg_sq"}
    if "noise_source" in options:
        keys |= {"exp_dev_sq", "dev_step"}
    assert all(state.keys() == keys for state in actual[1].state.values())


@pytest.mark.parametrize("impl", TORCH)
def test_dtypes_may_be_mixed_in_a_group(impl):
    """Each parameter moves as in a group of its own dtype: nothing is promoted."""
    dtypes = [F32, BF16, F64, C64, F32]

    def start(i):
        return torch.nn.Parameter(draw((4, 3), dtypes[i], torch.Generator().manual_seed(i)))

    def grad(i, step):
        return draw((4, 3), dtypes[i], torch.Generator().manual_seed(100 * step + i))

    together = [start(i) for i in range(5)]
    # Stochastic rounding is numbered by the position: here both are to be compared bit by bit.
    options = {"lr": 1e-2, "stochastic_rounding": False, **FLAGS[impl]}
    optimizer = PopRiskAdamW(together, **options)
    alone = [start(i) for i in range(5)]
    singles = [PopRiskAdamW([p], **options) for p in alone]
    for step in range(5):
        for i, (param, twin) in enumerate(zip(together, alone, strict=True)):
            param.grad, twin.grad = grad(i, step), grad(i, step)
            singles[i].step()
        optimizer.step()
    for param, twin in zip(together, alone, strict=True):
        assert torch.equal(param, twin)


@pytest.mark.parametrize("impl", EAGER)
def test_complex_parameters_are_two_real_ones(impl):
    """Real and imaginary parts are gated separately, as Adam scales them separately."""
    generator = torch.Generator().manual_seed(2)
    z = torch.nn.Parameter(draw((5, 3), torch.complex128, generator))
    re, im = (torch.nn.Parameter(part.clone()) for part in (z.detach().real, z.detach().imag))
    options = {"lr": 1e-2, "weight_decay": 0.1, **TEMPORAL, **FLAGS[impl]}
    ours, twins = PopRiskAdamW([z], **options), PopRiskAdamW([re, im], **options)
    for _ in range(10):
        grad = draw((5, 3), torch.complex128, generator)
        z.grad, re.grad, im.grad = grad.clone(), grad.real.clone(), grad.imag.clone()
        ours.step()
        twins.step()
    torch.testing.assert_close(z.detach(), torch.complex(re.detach(), im.detach()))
    state = ours.state[z]["exp_dev_sq"]
    assert torch.equal(state.real, twins.state[re]["exp_dev_sq"])
    assert torch.equal(state.imag, twins.state[im]["exp_dev_sq"])


@pytest.mark.parametrize("impl", EAGER)
@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch without grad_dtype")
def test_gradients_may_have_more_precision_than_their_parameter(impl):
    """float32 gradients of bfloat16 parameters enter the moments unrounded."""
    param = torch.nn.Parameter(torch.ones(5, dtype=BF16))
    param.grad_dtype = F32
    optimizer = PopRiskAdamW([param], lr=1e-2, **FLAGS[impl])
    grad = torch.full((5,), 1.001)  # between two bfloat16 numbers
    param.grad = grad.clone()
    optimizer.step()
    torch.testing.assert_close(optimizer.state[param]["exp_avg"], 0.1 * grad)
    assert torch.equal(param.grad, grad)


def transposed(base):
    return base.t().contiguous().t()


def every_second_column(base):
    wide = torch.zeros(*base.shape[:-1], 2 * base.shape[-1], dtype=base.dtype)
    view = wide[..., ::2]
    view.copy_(base)
    return view


def channels_last(base):
    return base.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", [transposed, every_second_column, channels_last])
@pytest.mark.parametrize("grad_layout", ["same", "contiguous"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("impl", TORCH)
def test_layout_of_memory_is_not_seen_in_the_values(impl, dtype, grad_layout, layout):
    """Bitwise, also where rounding draws are numbered: by position, not by address."""
    shape = (2, 3, 4, 5) if layout is channels_last else (6, 5)
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator).to(dtype)
    plain = torch.nn.Parameter(base.clone())
    other = torch.nn.Parameter(layout(base).detach())
    assert other.stride() != plain.stride()
    optimizers = [PopRiskAdamW([p], lr=1e-2, **TEMPORAL, **FLAGS[impl]) for p in (plain, other)]
    for _ in range(4):
        grad = torch.randn(shape, generator=generator).to(dtype)
        plain.grad = grad.clone()
        other.grad = layout(grad) if grad_layout == "same" else grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    tensors = zip([plain, *optimizers[0].state[plain].values()], strict=False)
    for a, b in zip(tensors, [other, *optimizers[1].state[other].values()], strict=True):
        if impl in EAGER:
            assert torch.equal(a[0], b)
        else:  # what a fused path cannot take is stepped eagerly
            torch.testing.assert_close(a[0], b, **TOLERANCES[F32])
    if layout is channels_last:
        state = optimizers[1].state[other]["exp_dev_sq"]
        assert state.is_contiguous(memory_format=torch.channels_last)
    if layout is every_second_column:  # those between them are nobody's
        assert not torch.as_strided(other.detach(), (6, 5), (10, 2), 1).any()


@pytest.mark.parametrize("impl", EVERY)
def test_scalars_and_empties(impl):
    """A 0-dim parameter moves as one of shape (1,); one without elements only counts."""
    scalar, vector = torch.nn.Parameter(torch.tensor(0.7)), torch.nn.Parameter(torch.tensor([0.7]))
    empty = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((0,), (0, 3), (2, 0, 3))]
    options = {"collect_stats_every": 1, **TEMPORAL, **FLAGS[impl]}
    optimizer = PopRiskAdamW([scalar, vector, *empty], **options)
    only_empty = PopRiskAdamW(empty[:2], **options)
    for step in range(5):
        scalar.grad, vector.grad = torch.tensor(0.1 + step), torch.tensor([0.1 + step])
        for param in empty:
            param.grad = torch.zeros_like(param)
        optimizer.step()
        only_empty.step()
    assert scalar.shape == ()
    assert torch.equal(scalar, vector[0])
    assert scalar.item() != 0.7
    for param in empty:
        assert optimizer.state[param]["step"].item() == 5
        assert optimizer.state[param]["exp_dev_sq"].shape == param.shape
    for value in (*optimizer.gate_stats().values(), *only_empty.gate_stats().values()):
        assert torch.isfinite(value)

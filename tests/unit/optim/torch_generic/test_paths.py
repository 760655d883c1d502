"""Every implementation against the single-tensor one: options, dtypes, devices, groups."""

from itertools import pairwise

import pytest
import torch

from poprisk_integrations import PopRiskAdamW
from tests.helpers.optim_problem import feed, gradients, make_params, max_ulp
from tests.unit.optim.torch_generic.optimizer_info import EAGER, IMPLEMENTATIONS, flags, inputs

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.complex64]
# Other orders of operations; bfloat16 parameters may round to the neighbour (2^-7 apart).
TOLERANCES = {
    torch.float32: {"rtol": 2e-5, "atol": 2e-6},
    torch.float64: {"rtol": 1e-11, "atol": 1e-13},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-3},
    torch.complex64: {"rtol": 2e-5, "atol": 2e-6},
}
STATES = {**TOLERANCES, torch.bfloat16: TOLERANCES[torch.float32]}

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]


def cells():
    """(implementation, dtype, groups); a compilation only to switch the gate off is slow."""
    found = []
    for impl in IMPLEMENTATIONS:
        for dtype in DTYPES:
            for groups in ("one", "two"):
                compiles_more = impl == "fused" and groups == "two"
                marks = [pytest.mark.slow] if compiles_more else []
                name = f"{impl}-{str(dtype).removeprefix('torch.')}-{groups}"
                found.append(pytest.param(impl, dtype, groups, marks=marks, id=name))
    return found


def draw(shape, dtype, generator):
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    if dtype.is_complex:
        values = torch.complex(values, torch.randn(shape, generator=generator, dtype=torch.float64))
    return values.to(dtype)


def run(dtype, device, groups, steps=15, **kwargs):
    """(parameters, optimizer) after some steps; with "two" groups the second has no gate."""
    generator = torch.Generator().manual_seed(0)
    shapes = [tuple(p.shape) for p in make_params()] * 2
    params = [torch.nn.Parameter(draw(s, dtype, generator).to(device)) for s in shapes]
    half = len(params) // 2
    given = params
    if groups == "two":
        given = [{"params": params[:half]}, {"params": params[half:], "gate": "none"}]
    optimizer = PopRiskAdamW(given, lr=1e-2, weight_decay=0.1, **kwargs)
    path = optimizer.path
    generator.manual_seed(1)
    for step in range(steps):
        for i, param in enumerate(params):
            grad = draw(param.shape, dtype, generator).to(device) + 0.3
            param.grad = None if (step + i) % 4 == 0 else grad
        optimizer.step()
    assert optimizer.path == path
    return params, optimizer


def assert_same(actual, expected, dtype):
    for a, e in zip(actual[0], expected[0], strict=True):
        torch.testing.assert_close(a.cpu(), e, **TOLERANCES[dtype])
        for key, value in expected[1].state[e].items():
            given = actual[1].state[a][key].cpu()
            assert given.dtype == value.dtype
            torch.testing.assert_close(given, value, **STATES[dtype], msg=key)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("impl", "dtype", "groups"), cells())
def test_matches_the_single_tensor_path(impl, dtype, groups, device):
    actual = run(dtype, device, groups, **flags(impl, device))
    expected = run(dtype, "cpu", groups, **IMPLEMENTATIONS["single_tensor"])
    assert expected[1].path == "single_tensor"
    path = actual[1].path
    assert path.startswith("fused_") if impl == "fused" else path == impl
    assert_same(actual, expected, dtype)
    if groups == "two":  # the gate is off in the second group, and on in the first
        half = len(actual[0]) // 2
        ungated = run(dtype, "cpu", "one", gate="none", **IMPLEMENTATIONS["single_tensor"])[0]
        for a, u in zip(actual[0][half:], ungated[half:], strict=True):
            torch.testing.assert_close(a.cpu(), u, **TOLERANCES[dtype])
        assert float((actual[0][0].cpu() - ungated[0]).detach().abs().max()) > 0.01


@pytest.mark.parametrize("kwargs", inputs("default", "tensor lr"))
@pytest.mark.parametrize(
    "impl", ["foreach", "capturable", pytest.param("fused", marks=pytest.mark.slow)]
)
def test_matches_for_every_option(impl, kwargs):
    kwargs = {k: v for k, v in kwargs.items() if k not in ("lr", "weight_decay")}
    actual = run(torch.float64, "cpu", "one", **flags(impl, **kwargs))
    expected = run(torch.float64, "cpu", "one", **flags("single_tensor", **kwargs))
    assert_same(actual, expected, torch.float64)
    for name, value in expected[1].gate_stats().items():
        torch.testing.assert_close(actual[1].gate_stats()[name], value, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("impl", EAGER)
def test_dtypes_may_be_mixed_in_a_group(impl):
    """Each parameter moves as in a group of its own dtype: nothing is promoted."""
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.float32]

    def start(i):
        value = draw((4, 3), dtypes[i], torch.Generator().manual_seed(i))
        return torch.nn.Parameter(value)

    def grad(i, step):
        return draw((4, 3), dtypes[i], torch.Generator().manual_seed(100 * step + i))

    together = [start(i) for i in range(5)]
    # Stochastic rounding is numbered by the position: here both are to be compared bit by bit.
    options = {"lr": 1e-2, "stochastic_rounding": False, **IMPLEMENTATIONS[impl]}
    optimizer = PopRiskAdamW(together, **options)
    for step in range(6):
        for i, param in enumerate(together):
            param.grad = grad(i, step)
        optimizer.step()
    for i, param in enumerate(together):
        alone = start(i)
        single = PopRiskAdamW([alone], **options)
        for step in range(6):
            alone.grad = grad(i, step)
            single.step()
        assert param.dtype == dtypes[i]
        assert torch.equal(param, alone)


@pytest.mark.parametrize("impl", EAGER)
def test_complex_parameters_are_two_real_ones(impl):
    """Real and imaginary parts are gated separately, as Adam scales them separately."""
    generator = torch.Generator().manual_seed(2)
    z = torch.nn.Parameter(draw((5, 3), torch.complex128, generator))
    re, im = (
        torch.nn.Parameter(z.detach().real.clone()),
        torch.nn.Parameter(z.detach().imag.clone()),
    )
    options = {"lr": 1e-2, "weight_decay": 0.1, **IMPLEMENTATIONS[impl]}
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
def test_complex_descent_in_the_plane(impl):
    """|z - target| shrinks where the loss is a real function of a complex point."""
    z = torch.nn.Parameter(torch.tensor([2.0 - 1.0j, -1.0 + 3.0j]))
    target = torch.tensor([0.5 + 0.5j, 0.5 + 0.5j])
    optimizer = PopRiskAdamW([z], lr=0.05, weight_decay=0.0, **IMPLEMENTATIONS[impl])
    distances = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = (z - target).abs().square().sum()
        loss.backward()
        optimizer.step()
        distances.append(loss.item())
    assert distances[-1] < 0.5 * distances[0]
    assert all(b < a for a, b in pairwise(distances))


@pytest.mark.parametrize("impl", EAGER)
@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch without grad_dtype")
def test_gradients_may_have_more_precision_than_their_parameter(impl):
    """float32 gradients of bfloat16 parameters enter the moments unrounded."""
    param = torch.nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
    param.grad_dtype = torch.float32
    optimizer = PopRiskAdamW([param], lr=1e-2, **IMPLEMENTATIONS[impl])
    grad = torch.full((5,), 1.001)  # between two bfloat16 numbers
    param.grad = grad.clone()
    optimizer.step()
    torch.testing.assert_close(optimizer.state[param]["exp_avg"], 0.1 * grad)
    assert torch.equal(param.grad, grad)


@pytest.mark.parametrize("impl", EAGER)
@pytest.mark.parametrize("copies", [1, 2])
def test_the_number_of_parameters_in_a_list_does_not_matter(impl, copies):
    """Horizontal fusion leaves each tensor's result alone, bit for bit."""

    def run_with(count):
        params = [p for c in range(count) for p in make_params(seed=c)]
        optimizer = PopRiskAdamW(params, lr=1e-2, **IMPLEMENTATIONS[impl])
        for row in gradients(6):
            feed(params, row * count)
            optimizer.step()
        return params

    assert max_ulp(run_with(copies)[:5], run_with(copies + 1)[:5]) == 0.0

"""Shapes and layouts of parameters that break careless code."""

import pytest
import torch

from poprisk_integrations import PopRiskAdamW
from tests.unit.optim.torch_generic.optimizer_info import EAGER, IMPLEMENTATIONS, flags, inputs


def transposed(base):
    return base.t().contiguous().t()


def every_second_column(base):
    wide = torch.zeros(*base.shape[:-1], 2 * base.shape[-1], dtype=base.dtype)
    view = wide[..., ::2]
    view.copy_(base)
    return view


def channels_last(base):
    return base.to(memory_format=torch.channels_last)


LAYOUTS = [transposed, every_second_column, channels_last]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", ["same", "contiguous"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", EAGER)
def test_layout_of_memory_is_not_seen_in_the_values(impl, dtype, grad_layout, layout):
    """Bitwise, also where rounding draws are numbered: by position, not by address."""
    shape = (2, 3, 4, 5) if layout is channels_last else (6, 5)
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator).to(dtype)
    plain = torch.nn.Parameter(base.clone())
    other = torch.nn.Parameter(layout(base).detach())
    assert other.stride() != plain.stride()
    options = {"lr": 1e-2, **IMPLEMENTATIONS[impl]}
    optimizers = PopRiskAdamW([plain], **options), PopRiskAdamW([other], **options)
    for _ in range(5):
        grad = torch.randn(shape, generator=generator).to(dtype)
        plain.grad = grad.clone()
        other.grad = layout(grad) if grad_layout == "same" else grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(plain, other)
    for key, value in optimizers[0].state[plain].items():
        assert torch.equal(optimizers[1].state[other][key], value)


@pytest.mark.parametrize("impl", EAGER)
def test_a_view_leaves_its_neighbours_alone(impl):
    """A parameter that is every second column must not write into the others."""
    wide = torch.arange(20.0).view(4, 5)
    param = wide[:, ::2].detach().requires_grad_()
    untouched = wide[:, 1::2].clone()
    optimizer = PopRiskAdamW([param], lr=0.5, **IMPLEMENTATIONS[impl])
    for _ in range(3):
        param.grad = torch.ones(4, 3)
        optimizer.step()
    assert torch.equal(wide[:, 1::2], untouched)
    assert not torch.equal(wide[:, ::2], torch.arange(20.0).view(4, 5)[:, ::2])


@pytest.mark.parametrize("kwargs", inputs("lr", "tensor lr"))
@pytest.mark.parametrize("impl", EAGER)
def test_scalars_and_empties(impl, kwargs):
    """A 0-dim parameter moves as one of shape (1,); one without elements only counts."""
    scalar, vector = torch.nn.Parameter(torch.tensor(0.7)), torch.nn.Parameter(torch.tensor([0.7]))
    empty = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((0,), (0, 3), (2, 0, 3))]
    optimizer = PopRiskAdamW([scalar, vector, *empty], **flags(impl, **kwargs))
    for step in range(5):
        scalar.grad, vector.grad = torch.tensor(0.1 + step), torch.tensor([0.1 + step])
        for param in empty:
            param.grad = torch.zeros_like(param)
        optimizer.step()
    assert scalar.shape == ()
    # With scalars on the device a 0-dim tensor is computed in their float64.
    torch.testing.assert_close(
        scalar, vector[0], rtol=1e-6 if impl == "capturable" else 0.0, atol=0.0
    )
    assert scalar.item() != 0.7
    for param in empty:
        assert optimizer.state[param]["step"].item() == 5
        assert optimizer.state[param]["exp_dev_sq"].shape == param.shape
    for value in optimizer.gate_stats().values():
        assert torch.isfinite(value)


@pytest.mark.parametrize("impl", EAGER)
def test_nothing_but_empties(impl):
    param = torch.nn.Parameter(torch.zeros(0, 4))
    optimizer = PopRiskAdamW([param], collect_stats_every=1, **IMPLEMENTATIONS[impl])
    for _ in range(2):
        param.grad = torch.zeros(0, 4)
        optimizer.step()
    assert optimizer.state[param]["step"].item() == 2
    assert all(torch.isfinite(v) for v in optimizer.gate_stats().values())


@pytest.mark.parametrize("impl", EAGER)
@pytest.mark.parametrize("state_dtype", ["bfloat16", "8bit"])
def test_low_precision_states_of_odd_shapes(impl, state_dtype):
    """0-dim, empty, and rows that do not fill a block, beside one that is coded."""
    shapes = [(), (0, 3), (7,), (9, 701), (2, 3, 1024)]
    params = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    options = {"lr": 1e-2, "gate": "none", **IMPLEMENTATIONS[impl]}
    optimizer = PopRiskAdamW(params, state_dtype=state_dtype, **options)
    exact = PopRiskAdamW(twins, **options)
    for _ in range(4):
        for param, twin in zip(params, twins, strict=True):
            param.grad = torch.randn(param.shape) + 1.0
            twin.grad = param.grad.clone()
        optimizer.step()
        exact.step()
    for param, twin in zip(params, twins, strict=True):
        assert torch.isfinite(param).all()
        torch.testing.assert_close(param, twin, rtol=0, atol=0.02)

"""Steps that must do nothing, and what no step may touch."""

import pytest
import torch

from poprisk_integrations import PopRiskAdamW
from tests.helpers.optim_problem import feed, gradients, make_params
from tests.unit.optim.torch_generic.optimizer_info import (
    EAGER,
    EVERY,
    IMPLEMENTATIONS,
    flags,
    inputs,
    snapshot,
    unchanged,
)


@pytest.mark.parametrize("kwargs", inputs())
@pytest.mark.parametrize("impl", EAGER)
def test_zero_gradients_move_nothing_without_decay(impl, kwargs):
    """From a fresh state, in which nothing is 0/0; a NaN would be seen here."""
    params = make_params()
    start = [p.detach().clone() for p in params]
    optimizer = PopRiskAdamW(params, **flags(impl, **{**kwargs, "weight_decay": 0.0}))
    for _ in range(4):
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
    for param, before in zip(params, start, strict=True):
        assert torch.equal(param, before)
        assert optimizer.state[param]["step"].item() == 4
        for key in ("exp_avg", "exp_avg_sq", "exp_dev_sq"):
            assert not optimizer.state[param][key].any()


@pytest.mark.parametrize("kwargs", inputs())
@pytest.mark.parametrize("impl", EAGER)
def test_no_gradients_move_nothing_at_all(impl, kwargs):
    """Weight decay included: a parameter without a gradient takes no part."""
    params = make_params()
    optimizer = PopRiskAdamW(params, **flags(impl, **{**kwargs, "weight_decay": 0.5}))
    for row in gradients(3):
        feed(params, row)
        optimizer.step()
    before = snapshot(optimizer)
    optimizer.zero_grad(set_to_none=True)
    for _ in range(2):
        optimizer.step()
    assert unchanged(optimizer, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kwargs", inputs("lr", "tensor lr"))
@pytest.mark.parametrize("impl", EAGER)
def test_lr_zero_is_inert(impl, kwargs, dtype):
    """Pitfall 17: no decay, no rounding, whatever the gradient; the moments go on."""
    params = make_params(dtype)
    start = [p.detach().clone() for p in params]
    optimizer = PopRiskAdamW(params, **flags(impl, **{**kwargs, "weight_decay": 0.5, "lr": 0.0}))
    for row in gradients(5, dtype):
        feed(params, row)
        optimizer.step()
    assert all(torch.equal(p, s) for p, s in zip(params, start, strict=True))
    assert optimizer.state[params[0]]["exp_avg"].any()


@pytest.mark.parametrize("kwargs", inputs("lr", "default"))
@pytest.mark.parametrize("impl", EAGER)
def test_gradients_are_not_written_whatever_the_options(impl, kwargs):
    """Pitfall 11, beyond the options of `test_nonfinite.py`: the `.grad` that a user reads after
    the step is the one that backward left, the same object with the same version."""
    layouts = [
        torch.randn(6, 4).t(),
        torch.randn(1).expand(5),  # one number in memory, five elements
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(()),
    ]
    params = [torch.nn.Parameter(torch.randn(g.shape)) for g in layouts]
    optimizer = PopRiskAdamW(params, **flags(impl, **kwargs))
    for _ in range(3):
        kept = [g.clone(memory_format=torch.preserve_format) for g in layouts]
        for param, grad in zip(params, layouts, strict=True):
            param.grad = grad
        versions = [g._version for g in layouts]
        optimizer.step()
        for param, grad, value in zip(params, layouts, kept, strict=True):
            assert param.grad is grad
            assert torch.equal(grad, value)
        assert [g._version for g in layouts] == versions


@pytest.mark.parametrize("state_dtype", ["bfloat16", "8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", EAGER)
def test_low_precision_states_of_zero_gradients_stay_zero(impl, dtype, state_dtype):
    """And the gradient is not written on this way either."""
    param = torch.nn.Parameter(torch.randn(8, 512).to(dtype))
    start = param.detach().clone()
    optimizer = PopRiskAdamW(
        [param], weight_decay=0.0, state_dtype=state_dtype, **IMPLEMENTATIONS[impl]
    )
    param.grad = torch.zeros_like(param)
    for _ in range(3):
        optimizer.step()
    assert torch.equal(param, start)
    assert not param.grad.any()
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert torch.equal(param.grad, torch.ones_like(param))
    assert not torch.equal(param, start)


@pytest.mark.parametrize("impl", EVERY)
def test_a_step_needs_no_autograd_and_records_none(impl):
    """`differentiable` is refused; what a step leaves behind belongs to no graph."""
    params = make_params()
    optimizer = PopRiskAdamW(params, **flags(impl))
    with torch.enable_grad():
        for row in gradients(3):
            feed(params, row)
            optimizer.step()
    for param in params:
        assert param.is_leaf
        assert param.grad_fn is None
        for value in optimizer.state[param].values():
            assert not value.requires_grad


@pytest.mark.parametrize("impl", EVERY)
def test_a_backward_pass_through_parameters_that_have_moved_is_refused(impl):
    """Autograd compares versions: work in place that it is not told of gives wrong gradients."""
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = PopRiskAdamW([param], **flags(impl))
    loss = param.square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()

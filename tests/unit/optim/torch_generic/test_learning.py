"""It goes downhill, with schedulers, groups, closures and tensors as learning rates."""

import copy

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from poprisk_integrations import PopRiskAdamW
from tests.helpers.optim_problem import feed, gradients, make_params, max_ulp, train
from tests.unit.optim.torch_generic.optimizer_info import (
    EAGER,
    EVERY,
    INFO,
    flags,
    inputs,
    needs_cuda,
)


def regression(dtype=torch.float32, device="cpu"):
    """A weight and a bias whose best fit is known to be zero, and the loss."""
    generator = torch.Generator().manual_seed(4)
    shapes = ((6, 3), (6,), (3,))
    weight, bias, x = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
        for shape in shapes
    )
    weight, bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
    return weight, bias, lambda: (weight @ x + bias).square().sum()


def descend(optimizer, loss_of, steps, schedulers=(), maximize=False):
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = -loss_of() if maximize else loss_of()
        loss.backward()
        return loss

    for _ in range(steps):
        losses.append(optimizer.step(closure).item())
        for scheduler in schedulers:
            # one of the schedulers wants the metric
            scheduler.step(*([losses[-1]] if isinstance(scheduler, ReduceLROnPlateau) else []))
    return losses


@pytest.mark.parametrize("kwargs", inputs("published"))
@pytest.mark.parametrize("impl", EAGER)
def test_goes_the_right_direction(impl, kwargs):
    weight, bias, loss_of = regression()
    kwargs = {"lr": 0.02, **kwargs}
    optimizer = INFO.optim_cls([weight, bias], **flags(impl, **kwargs))
    maximize = kwargs.get("maximize", False)
    losses = descend(optimizer, loss_of, 40, maximize=maximize)
    assert losses[-1] > losses[0] if maximize else losses[-1] < losses[0]
    assert optimizer.path == impl


def test_a_noise_free_problem_passes_the_published_gate_late():
    """alpha=1 shuts nearly everything while m is still warming up, yet in the end it descends."""
    weight, bias, loss_of = regression()
    optimizer = PopRiskAdamW.paper([weight, bias], lr=0.02)
    losses = descend(optimizer, loss_of, 80)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("factories", INFO.scheduler_inputs)
@pytest.mark.parametrize("impl", EAGER)
def test_right_direction_with_schedulers_and_groups(impl, factories):
    weight, bias, loss_of = regression()
    groups = [{"params": [weight]}, {"params": [bias], "lr": 0.01, "gate": "none"}]
    optimizer = INFO.optim_cls(groups, lr=0.03, **flags(impl))
    schedulers = [factory(optimizer) for factory in factories]
    losses = descend(optimizer, loss_of, 30, schedulers)
    assert losses[-1] < losses[0]
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates[0] == pytest.approx(3 * rates[1])


def test_plateau_reduces_the_rate():
    param = torch.nn.Parameter(torch.ones(1))
    optimizer = PopRiskAdamW([param], lr=0.1)
    scheduler = ReduceLROnPlateau(optimizer, patience=1, factor=0.5)
    for _ in range(5):
        param.grad = torch.ones(1)
        optimizer.step()
        scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] == 0.025


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_tensor_lr_is_the_same_as_a_number_and_stays_the_users_tensor(impl, shape):
    def run(lr):
        params = make_params()
        optimizer = PopRiskAdamW(params, lr=lr, **flags(impl))
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        for row in gradients(8):
            feed(params, row)
            optimizer.step()
            scheduler.step()
        return params, optimizer.param_groups[0]["lr"]

    expected, _ = run(0.125)
    lr = torch.full(shape, 0.125, dtype=torch.float64)
    actual, kept = run(lr)
    assert kept is lr  # schedulers fill it in place; graphs and users hold on to it
    assert max_ulp(actual, expected) == 0.0
    assert float(lr) == pytest.approx(0.125 * 0.8**8)
    with pytest.raises(ValueError, match="Invalid learning rate"):
        PopRiskAdamW(make_params(), lr=-lr)


@pytest.mark.parametrize("impl", EVERY)
def test_groups_have_their_own_lr_decay_and_betas(impl):
    """Two groups of one optimizer are two optimizers."""
    choices = [{"lr": 0.02, "weight_decay": 0.3}, {"lr": 0.005, "betas": (0.5, 0.9)}]
    first, second = make_params(), make_params(seed=3)
    optimizer = PopRiskAdamW(
        [{"params": p, **c} for p, c in zip((first, second), choices, strict=True)],
        **flags(impl),
    )
    history = gradients(12)
    for row in history:
        feed(first, row)
        feed(second, row)
        optimizer.step()
    for params, choice, seed in zip((first, second), choices, (0, 3), strict=True):
        alone, _ = train(
            lambda p, choice=choice: PopRiskAdamW(p, **choice, **flags(impl)),
            history=history,
            params=make_params(seed=seed),
        )
        assert max_ulp(params, alone) == 0.0


@pytest.mark.parametrize("kwargs", inputs("maximize"))
@pytest.mark.parametrize("impl", EAGER)
def test_maximize_is_minimizing_with_negated_gradients(impl, kwargs):
    history = gradients(8)
    negated = [[None if g is None else -g for g in row] for row in history]
    up, _ = train(
        lambda p: PopRiskAdamW(p, **flags(impl, maximize=True, **kwargs)), history=history
    )
    down, _ = train(lambda p: PopRiskAdamW(p, **flags(impl, **kwargs)), history=negated)
    assert max_ulp(up, down) == 0.0


@pytest.mark.parametrize("impl", EVERY)
def test_a_group_added_in_the_middle_starts_its_own_count(impl):
    """The late parameters move as if they were alone; the early ones as if they stayed alone."""
    early, late = make_params(), make_params(seed=3)
    optimizer = PopRiskAdamW(early, lr=1e-2, **flags(impl))
    history = gradients(12)
    for step, row in enumerate(history):
        if step == 5:
            optimizer.add_param_group({"params": late, "weight_decay": 0.2})
        feed(early, row)
        feed(late, row)  # gradients of parameters that it does not know yet mean nothing
        optimizer.step()

    def alone(seed, history, **kwargs):
        return train(
            lambda p: PopRiskAdamW(p, lr=1e-2, **kwargs, **flags(impl)),
            history=history,
            params=make_params(seed=seed),
        )[0]

    assert max_ulp(early, alone(0, history)) == 0.0
    assert max_ulp(late, alone(3, history[5:], weight_decay=0.2)) == 0.0


@pytest.mark.parametrize("impl", EVERY)
def test_frozen_parameters_rest_and_resume_where_they_were(impl):
    """Pitfall 20: counts are the parameter's own, not the optimizer's."""
    params = make_params()
    optimizer = PopRiskAdamW(params, lr=1e-2, **flags(impl))
    history = gradients(15)
    for step, row in enumerate(history):
        frozen = 4 <= step < 9
        params[0].requires_grad_(not frozen)
        feed(params, row)
        if frozen:
            params[0].grad = None
            rest = params[0].detach().clone(), copy.deepcopy(optimizer.state[params[0]])
        optimizer.step()
        if frozen:
            assert torch.equal(params[0], rest[0])
            for key, value in rest[1].items():
                assert torch.equal(optimizer.state[params[0]][key], value), key
    seen = [[row[0]] for row in history[:4] + history[9:]]
    alone, _ = train(
        lambda p: PopRiskAdamW(p, lr=1e-2, **flags(impl)),
        history=seen,
        params=make_params()[:1],
    )
    assert max_ulp(params[:1], alone) == 0.0
    assert optimizer.state[params[0]]["step"].item() == 10
    assert optimizer.state[params[2]]["step"].item() == 15


@pytest.mark.parametrize("impl", EVERY)
def test_closure_runs_once_with_gradients_enabled_and_gives_its_loss(impl):
    weight, bias, loss_of = regression()
    optimizer = PopRiskAdamW([weight, bias], **flags(impl))
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        loss = loss_of()
        loss.backward()
        calls.append(loss)
        return loss

    with torch.no_grad():
        assert optimizer.step(closure) is calls[0]
        assert not torch.is_grad_enabled()
    assert len(calls) == 1
    assert optimizer.step() is None
    assert not weight.grad.requires_grad


@needs_cuda
@pytest.mark.gpu
def test_right_direction_with_a_tensor_lr_on_cuda():
    weight, bias, loss_of = regression(device="cuda")
    optimizer = PopRiskAdamW([weight, bias], lr=torch.tensor(0.02, device="cuda"))
    losses = descend(optimizer, loss_of, 40)
    assert losses[-1] < losses[0]

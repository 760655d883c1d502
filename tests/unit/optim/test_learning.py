"""It goes downhill, with schedulers, groups, closures and tensors as learning rates."""

import copy

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, ReduceLROnPlateau

from poprisk_integrations import PopRiskAdamW
from tests.helpers.optim_problem import feed, gradients, make_params, max_ulp, train
from tests.unit.optim.paths import EAGER, FLAGS, TORCH, needs_cuda


def regression(device="cpu"):
    """A weight and a bias whose best fit is known to be zero, and the loss."""
    generator = torch.Generator().manual_seed(4)
    shapes = ((6, 3), (6,), (3,))
    weight, bias, x = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(device, torch.float32)
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


CELLS = [(impl, "cpu") for impl in EAGER]
CELLS.append(pytest.param(None, "cuda", marks=needs_cuda))


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"lr": torch.tensor(0.02)},
        {"weight_decay": 0.1, "maximize": True},
        {"weight_decay": 0.1, "gate_decay": True},
        {"gate": "none"},
        {"gate": "hard"},
        {"gate": "snr", "alpha": "fresh"},
        {"gate_warmup": 3, "gate_blend": 0.5},
        {"preserve_norm": True},
        {"betas": (0.0, 0.9), "rho": 0.5, "eps": 1e-3, "noise_source": "temporal"},
    ],
    ids=str,
)
@pytest.mark.parametrize(("impl", "device"), CELLS)
def test_goes_the_right_direction(impl, device, kwargs):
    weight, bias, loss_of = regression(device)
    kwargs = copy.deepcopy({"lr": 0.02, **kwargs})
    optimizer = PopRiskAdamW([weight, bias], **kwargs, **(FLAGS[impl] if impl else {}))
    maximize = kwargs.get("maximize", False)
    losses = descend(optimizer, loss_of, 40, maximize=maximize)
    assert losses[-1] > losses[0] if maximize else losses[-1] < losses[0]
    assert impl is None or optimizer.path == impl


@pytest.mark.parametrize(
    "factories",
    [
        [lambda opt: CosineAnnealingLR(opt, T_max=40)],
        [lambda opt: LinearLR(opt, start_factor=0.5), ReduceLROnPlateau],
    ],
)
@pytest.mark.parametrize("impl", EAGER)
def test_right_direction_with_schedulers_and_groups(impl, factories):
    weight, bias, loss_of = regression()
    groups = [{"params": [weight]}, {"params": [bias], "lr": 0.01, "gate": "none"}]
    optimizer = PopRiskAdamW(groups, lr=0.03, **FLAGS[impl])
    schedulers = [factory(optimizer) for factory in factories]
    losses = descend(optimizer, loss_of, 30, schedulers)
    assert losses[-1] < losses[0]
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates[0] == pytest.approx(3 * rates[1])


@pytest.mark.parametrize("impl", TORCH)
def test_groups_have_their_own_lr_decay_and_betas(impl):
    """Two groups of one optimizer are two optimizers."""
    choices = [{"lr": 0.02, "weight_decay": 0.3}, {"lr": 0.005, "betas": (0.5, 0.9)}]
    first, second = make_params(), make_params(seed=3)
    optimizer = PopRiskAdamW(
        [{"params": p, **c} for p, c in zip((first, second), choices, strict=True)],
        **FLAGS[impl],
    )
    history = gradients(12)
    for row in history:
        feed(first, row)
        feed(second, row)
        optimizer.step()
    for params, choice, seed in zip((first, second), choices, (0, 3), strict=True):
        alone, _ = train(
            lambda p, choice=choice: PopRiskAdamW(p, **choice, **FLAGS[impl]),
            history=history,
            params=make_params(seed=seed),
        )
        assert max_ulp(params, alone) == 0.0


@pytest.mark.parametrize("impl", TORCH)
def test_a_group_added_in_the_middle_starts_its_own_count(impl):
    """The late parameters move as if they were alone; the early ones as if they stayed alone."""
    early, late = make_params(), make_params(seed=3)
    optimizer = PopRiskAdamW(early, lr=1e-2, **FLAGS[impl])
    history = gradients(12)
    for step, row in enumerate(history):
        if step == 5:
            optimizer.add_param_group({"params": late, "weight_decay": 0.2})
        feed(early, row)
        feed(late, row)  # gradients of parameters that it does not know yet mean nothing
        optimizer.step()

    def alone(seed, history, **kwargs):
        return train(
            lambda p: PopRiskAdamW(p, lr=1e-2, **kwargs, **FLAGS[impl]),
            history=history,
            params=make_params(seed=seed),
        )[0]

    assert max_ulp(early, alone(0, history)) == 0.0
    assert max_ulp(late, alone(3, history[5:], weight_decay=0.2)) == 0.0


@pytest.mark.parametrize("impl", TORCH)
def test_frozen_parameters_rest_and_resume_where_they_were(impl):
    """Pitfall 20: counts are the parameter's own, not the optimizer's."""
    params = make_params()
    optimizer = PopRiskAdamW(params, lr=1e-2, **FLAGS[impl])
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
        lambda p: PopRiskAdamW(p, lr=1e-2, **FLAGS[impl]),
        history=seen,
        params=make_params()[:1],
    )
    assert max_ulp(params[:1], alone) == 0.0
    assert optimizer.state[params[0]]["step"].item() == 10
    assert optimizer.state[params[2]]["step"].item() == 15


@pytest.mark.parametrize("impl", TORCH)
def test_closure_runs_once_with_gradients_enabled_and_gives_its_loss(impl):
    weight, bias, loss_of = regression()
    optimizer = PopRiskAdamW([weight, bias], **FLAGS[impl])
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

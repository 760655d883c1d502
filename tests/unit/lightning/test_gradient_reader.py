"""Gradients, learning rates and applied steps of any optimizer."""

import pytest
import torch
from torch import nn

from poprisk_integrations.lightning.callbacks.gradient_reader import GradientReader


def optimizer_of(*groups, lr=0.1):
    return torch.optim.SGD([{"params": list(g)} for g in groups], lr=lr)


def step(reader, optimizer, *grads, count=True):
    for param, grad in zip(optimizer.param_groups[0]["params"], grads, strict=True):
        param.grad = torch.tensor(grad)
    reader.read(optimizer, count=count)
    optimizer.step()


def test_reads_the_learning_rate_of_the_step():
    param = nn.Parameter(torch.zeros(()))
    optimizer = optimizer_of([param])
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    reader = GradientReader(optimizer, 4)
    step(reader, optimizer, 1.0)
    schedule.step()
    assert reader.take_lr() == 0.1


def test_the_largest_rate_counts_and_empty_groups_do_not():
    optimizer = optimizer_of([nn.Parameter(torch.zeros(1))], [nn.Parameter(torch.zeros(1))])
    optimizer.param_groups[0]["lr"] = torch.tensor(0.01)
    optimizer.param_groups.append({"params": [], "lr": 9.0})
    reader = GradientReader(optimizer, 4)
    reader.read(optimizer, count=True)
    assert reader.lr == 0.1
    assert type(reader.lr) is float


def test_a_skipped_step_takes_no_time():
    param = nn.Parameter(torch.zeros(()))
    optimizer = optimizer_of([param])
    reader = GradientReader(optimizer, 4)
    reader.read(optimizer, count=True)  # and no optimizer.step()
    assert reader.take_lr() == 0.0
    step(reader, optimizer, 1.0)
    assert reader.take_lr() == 0.1
    assert reader.take_lr() == 0.0  # taken once


def test_uncounted_steps_leave_the_window_alone():
    optimizer = optimizer_of([nn.Parameter(torch.zeros(()))])
    reader = GradientReader(optimizer, 4)
    for grad in (1.0, 3.0, 1.0):
        step(reader, optimizer, grad)
    step(reader, optimizer, 100.0, count=False)
    assert not reader.window.is_full
    step(reader, optimizer, 3.0)
    closed = reader.close()
    assert closed.steps == 4
    assert float(closed.noise) == pytest.approx(4 / 3)  # variance of 1, 3, 1, 3


@pytest.mark.parametrize("scale", [2.0, torch.tensor(2.0)])
def test_gradients_are_read_on_the_scale_that_is_asked_for(scale):
    param = nn.Parameter(torch.zeros(()))
    optimizer = optimizer_of([param])
    reader = GradientReader(optimizer, 4)
    param.grad = torch.tensor(3.0)
    reader.read(optimizer, scale=scale)
    assert float(reader.state_dict()["sums"]["0"]) == 6.0
    assert float(param.grad) == 3.0


@pytest.mark.parametrize(("found_inf", "lr"), [(0.0, 0.1), (1.0, 0.0)])
def test_a_fused_optimizer_is_told_what_the_scaler_found(found_inf, lr):
    param = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([param], lr=0.1, fused=True)
    reader = GradientReader(optimizer, 4)
    param.grad = torch.tensor(1.0)
    reader.read(optimizer)
    optimizer.found_inf = torch.tensor(found_inf)
    optimizer.step()
    assert reader.take_lr() == lr


def test_another_set_of_trained_parameters_starts_afresh():
    first, second = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
    optimizer = optimizer_of([first, second])
    reader = GradientReader(optimizer, 4)
    step(reader, optimizer, 1.0, 1.0)
    first.requires_grad_(False)
    reader.read(optimizer, count=True)
    assert reader.state_dict()["seen"] == 1


@pytest.mark.parametrize("shape", [(3,), (2, 1)])
def test_a_state_of_other_shapes_does_not_fit(shape):
    optimizer = optimizer_of([nn.Parameter(torch.zeros(2))])
    reader = GradientReader(optimizer, 4)
    step(reader, optimizer, [1.0, 2.0])
    state = reader.state_dict()
    assert reader.resume(state) is None
    assert reader.resume(None) is None
    other = GradientReader(optimizer_of([nn.Parameter(torch.zeros(shape))]), 4)
    assert "does not fit" in other.resume(state)
    assert other.state_dict()["seen"] == 0


def test_release_removes_the_hook_and_keeps_the_window():
    optimizer = optimizer_of([nn.Parameter(torch.zeros(2))])
    reader = GradientReader(optimizer, 4)
    step(reader, optimizer, [1.0, 2.0])
    state = reader.release()
    assert not optimizer._optimizer_step_post_hooks
    assert state["seen"] == 1
    assert torch.equal(state["sums"]["0"], torch.tensor([1.0, 2.0]))

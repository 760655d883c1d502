"""Gradients, learning rates, applied steps and passes over the data, of any optimizer."""

import pytest
import torch
from torch import nn

from poprisk_integrations.diagnostics.data_pass import DataPass
from poprisk_integrations.diagnostics.gradient_reader import GradientReader
from poprisk_integrations.diagnostics.run_length import RunPlan


def plan_of(window=4, batches=None, asked=None, accumulation=1):
    return RunPlan.of(
        DataPass(batches=batches),
        window=window,
        asked=asked,
        run_steps=100,
        epoch_batches=batches,
        accumulation=accumulation,
        batch_size=2,
    )


def weight(*shape):
    return nn.Parameter(torch.zeros(shape))


def reader_of(*params, said=None, lr=0.1, optimizer=None, **plan):
    optimizer = optimizer or torch.optim.SGD(list(params), lr=lr)
    said = [] if said is None else said
    return GradientReader(optimizer, plan_of(**plan), warn=said.append), optimizer


def step(reader, optimizer, *grads, steps=0, count=True):
    for param, grad in zip(optimizer.param_groups[0]["params"], grads, strict=True):
        param.grad = torch.tensor(grad)
    reader.read(optimizer, steps, count=count)
    optimizer.step()
    reader.count_batch()
    reader.step_ends()
    return reader.take_lr()


def test_the_learning_rate_of_the_step_is_the_largest_of_groups_that_hold_something():
    reader, optimizer = reader_of(weight())
    optimizer.add_param_group({"params": [weight()], "lr": torch.tensor(0.01)})
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    reader.read(optimizer, 0)
    optimizer.step()
    schedule.step()
    assert (reader.lr, type(reader.lr)) == (0.1, float)
    assert reader.owed_lr == reader.take_lr() == 0.1
    assert reader.take_lr() == 0.0  # taken once
    optimizer.param_groups.append({"params": [], "lr": 9.0})
    reader.read(optimizer, 1)
    assert reader.lr == 0.05


@pytest.mark.parametrize("found_inf", [None, 0.0, 1.0])
def test_a_skipped_step_takes_no_time(found_inf):
    """None: the scaler makes no step. A fused optimizer is told what it found, and skips itself."""
    param = weight()
    optimizer = torch.optim.SGD([param], lr=0.1, fused=found_inf is not None)
    reader, _ = reader_of(optimizer=optimizer)
    param.grad = torch.tensor(1.0)
    reader.read(optimizer, 0)
    if found_inf is not None:
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()
    assert reader.take_lr() == (0.1 if found_inf == 0.0 else 0.0)


def test_steps_without_new_gradients_leave_the_window_alone():
    reader, optimizer = reader_of(weight())
    for grad in (1.0, 3.0, 1.0):
        step(reader, optimizer, grad)
    step(reader, optimizer, 100.0, count=False)
    assert not reader.window.is_full
    step(reader, optimizer, 3.0)
    closed = reader.close(5)
    assert closed.steps == 4
    assert float(closed.noise) == pytest.approx(4 / 3)  # variance of 1, 3, 1, 3


@pytest.mark.parametrize(
    ("options", "reused"),
    [
        ({"batches": 5}, [False, False, True, True]),
        ({"batches": 8}, [False, False, True, True]),
        ({"batches": 9}, [False, False, False, True]),
        ({"asked": 4}, [False, True, True, True]),
        ({}, [False] * 4),
    ],
)
def test_a_window_is_of_data_seen_before_if_a_pass_was_over_when_it_began(options, reused):
    reader, optimizer = reader_of(weight(), **options)
    found = []
    for number in range(16):
        step(reader, optimizer, float(number % 3), steps=number)
        if reader.window.is_full:
            found.append(reader.reused)
            reader.close(number + 1)
    assert found == reused


def test_windows_follow_the_plan():
    reader, optimizer = reader_of(weight(), batches=8)
    step(reader, optimizer, 1.0)
    assert reader.follow(plan_of(batches=8)) == []
    assert reader.window.seen == 1
    changes = reader.follow(plan_of(batches=8, accumulation=2))
    assert changes == ["epoch_steps 8 -> 4", "accumulation_steps 1 -> 2"]
    assert reader.window.seen == 0


def state_after(*grads, **plan):
    reader, optimizer = reader_of(weight(2), **plan)
    for number, grad in enumerate(grads):
        step(reader, optimizer, [grad, 2 * grad], steps=number)
    return reader.state_dict(), reader.setup


def test_names_of_older_checkpoints_are_known():
    state, _ = state_after(1.0)
    before = {"world size": 2, "accumulate_grad_batches": 1, "per-device batch size": 2}
    said = reader_of(weight(2))[0].resume(state, 1, before)
    assert said == (
        "resumed with world_size 2 -> 1. What was counted so far is kept; the unfinished window "
        "starts afresh."
    )


def test_a_state_that_counted_no_batches_and_one_of_a_step_that_is_owed():
    again, _ = reader_of(weight(2), batches=8, accumulation=2)
    state = {"window": None, "reused": False, "passes": None, "owed_lr": 0.5}
    assert again.resume(state, 2, {}) is None
    assert again.passes == pytest.approx(5 / 8)  # the owed step's last batch too
    assert (again.take_lr(), again.take_lr()) == (0.5, 0.0)


@pytest.mark.parametrize("shape", [(3,), (2, 1)])
def test_a_window_of_other_shapes_starts_afresh(shape):
    state, setup = state_after(1.0)
    other, _ = reader_of(weight(*shape))
    assert "does not fit the trained parameters" in other.resume(state, 1, setup)
    assert other.state_dict()["window"]["seen"] == 0


def test_settings_that_no_window_depends_on_keep_it():
    state, setup = state_after(1.0)
    again, _ = reader_of(weight(2))
    said = again.resume(state, 1, {**setup, "kappa": 2.0}, {"kappa": 3.0})
    assert said == "resumed with kappa 2.0 -> 3.0. What was counted so far is kept."
    assert again.window.seen == 1


def test_another_optimizer_is_followed_and_released():
    param = weight(2)
    reader, first = reader_of(param)
    second = torch.optim.SGD([param], lr=0.3)
    step(reader, first, [1.0, 2.0])
    assert step(reader, second, [1.0, 2.0]) == 0.3
    assert not first._optimizer_step_post_hooks
    state = reader.release()
    assert not second._optimizer_step_post_hooks
    assert torch.equal(state["window"]["sums"]["0"], torch.tensor([2.0, 4.0]))

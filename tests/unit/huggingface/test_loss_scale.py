"""The fp16 loss scale, wherever in a step it is taken out; with the scaler of the CPU."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from poprisk_integrations.huggingface import PopRiskEarlyStoppingCallback, PopRiskMonitorCallback
from poprisk_integrations.huggingface.callbacks.loss_scale import inverse_loss_scale
from poprisk_integrations.optim import PopRiskAdamW
from tests.helpers.tiny_trainer import arguments
from tests.helpers.trainer_events import EventSequence

GRADIENTS = (1.0, 3.0, float("inf"), 2.0, 7.0)


def _optimizer(parameter, scaler, fused):
    inner = (
        torch.optim.AdamW([parameter], lr=0.1, fused=True)
        if fused
        else torch.optim.SGD([parameter], lr=0.1)
    )
    assert bool(getattr(inner, "_step_supports_amp_scaling", False)) is fused
    return AcceleratedOptimizer(inner, scaler=scaler)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscaled_by_trainer", [True, False])
def test_windows_hold_unscaled_gradients(tmp_path, unscaled_by_trainer, fused):
    """Trainer unscales before it clips; without clipping, versions up to 5.0 leave it to `step`."""
    args = arguments(tmp_path)
    Accelerator(cpu=True)
    parameter = torch.nn.Parameter(torch.ones(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = _optimizer(parameter, scaler, fused)
    callback = PopRiskEarlyStoppingCallback(window=5)
    run = EventSequence(callback, optimizer, args)
    for gradient in GRADIENTS:
        scaler.scale((parameter * gradient).sum()).backward()
        if unscaled_by_trainer:
            scaler.unscale_(optimizer.optimizer)
        run.step()
        parameter.grad = None
    (row,) = callback.progress.history
    # A = 13 and Q = 63 in each of two coordinates over the 4 finite steps; the scale has halved.
    assert row["steps"] == 4
    assert row["noise"] == pytest.approx(2 * (63 - 13**2 / 4) / 3)
    assert scaler.get_scale() == 512.0
    assert callback.stopping_state["lr_sum"] == pytest.approx(0.4)  # the skipped step took no time


@pytest.mark.parametrize("unscaled_by_trainer", [False, True])
def test_the_monitor_looks_at_unscaled_gradients_only(tmp_path, unscaled_by_trainer):
    args = arguments(tmp_path)
    Accelerator(cpu=True)
    parameter = torch.nn.Parameter(torch.ones(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = AcceleratedOptimizer(PopRiskAdamW([parameter], gate="none"), scaler=scaler)
    monitor = PopRiskMonitorCallback(every_n_steps=1)
    run = EventSequence(monitor, optimizer, args, model=torch.nn.ParameterList([parameter]))
    for _ in range(3):
        scaler.scale(parameter.sum()).backward()
        if unscaled_by_trainer:
            scaler.unscale_(optimizer.optimizer)
        run.event("on_pre_optimizer_step")
        optimizer.step()
        run.event("on_optimizer_step")
        parameter.grad = None
    decrease = monitor.metrics().get("poprisk/predicted_decrease")
    # Two coordinates with a gradient of 1, and a step of lr in each.
    assert decrease == (pytest.approx(2e-3, rel=1e-4) if unscaled_by_trainer else None)


def test_no_scaler_no_scale():
    parameter = torch.nn.Parameter(torch.ones(2))
    plain = torch.optim.SGD([parameter], lr=0.1)
    assert inverse_loss_scale(plain) == 1.0
    Accelerator(cpu=True)
    off = torch.amp.GradScaler("cpu", enabled=False)
    assert inverse_loss_scale(AcceleratedOptimizer(plain, scaler=off)) == 1.0
    on = torch.amp.GradScaler("cpu", init_scale=8.0)
    on.scale(torch.ones(()))
    assert inverse_loss_scale(AcceleratedOptimizer(plain, scaler=on)) == 1 / 8

"""The fp16 loss scale, wherever in a step it is taken out; with the scaler of the CPU."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from poprisk_integrations.huggingface import PopRiskEarlyStoppingCallback, PopRiskMonitorCallback
from poprisk_integrations.optim import PopRiskAdamW
from tests.helpers.tiny_trainer import arguments
from tests.helpers.trainer_events import EventSequence

GRADIENTS = (1.0, 3.0, float("inf"), 2.0, 7.0)


@pytest.fixture(params=[True, False], ids=["unscaled by trainer", "scaled until the step"])
def steps(request, tmp_path):
    """Trainer unscales before it clips; without clipping, versions up to 5.0 leave it to `step`."""
    args, parameter = arguments(tmp_path), torch.nn.Parameter(torch.ones(2))
    Accelerator(cpu=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def make(callback, inner, gradients):
        optimizer = AcceleratedOptimizer(inner([parameter]), scaler=scaler)
        run = EventSequence(callback, optimizer, args, model=torch.nn.ParameterList([parameter]))
        for gradient in gradients:
            scaler.scale((parameter * gradient).sum()).backward()
            if request.param:
                scaler.unscale_(optimizer.optimizer)
            run.step()
            parameter.grad = None
        return scaler

    return make


@pytest.mark.parametrize("fused", [False, True])
def test_windows_hold_unscaled_gradients(steps, fused):
    """And a step that the scaler skipped is no training time."""

    def inner(params):
        return torch.optim.AdamW(params, lr=0.1, fused=True) if fused else torch.optim.SGD(params)

    callback = PopRiskEarlyStoppingCallback(criterion="signal", window=5)
    scaler = steps(callback, inner, GRADIENTS)
    (row,) = callback.history
    # A = 13 and Q = 63 in each of two coordinates over the 4 finite steps; the scale has halved.
    assert row["steps"] == 4
    assert row["noise"] == pytest.approx(2 * (63 - 13**2 / 4) / 3)
    assert scaler.get_scale() == 512.0
    lr = 0.1 if fused else 1e-3
    assert callback.stopping_state["lr_sum"] == pytest.approx(4 * lr)


def test_the_monitor_looks_at_gradients_without_the_scale(steps):
    monitor = PopRiskMonitorCallback(every_n_steps=1)
    steps(monitor, lambda params: PopRiskAdamW(params, gate="none"), (1.0, 1.0, 1.0))
    # Two coordinates with a gradient of 1, and a step of lr in each.
    decrease = monitor.metrics()["poprisk/predicted_decrease"]
    assert decrease == pytest.approx(2e-3, rel=1e-4)

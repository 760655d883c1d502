"""The mean gate, sampled without a trace in training or in other samples."""

import pytest
import torch
from torch import nn

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.lightning.callbacks.gate_clock import GateClock
from poprisk_integrations.lightning.callbacks.gradient_reader import GradientReader


def parameters(seed=0):
    g = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(n, generator=g)) for n in (5, 300)]


def noise(params, step):
    g = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=g) + 0.3


def step(optimizer, params, index):
    noise(params, index)
    optimizer.step()


def test_other_optimizers_have_an_open_gate():
    params = parameters()
    clock = GateClock(torch.optim.AdamW(params), "cpu")
    clock.sample()
    clock.end_step()
    clock.update()
    assert clock.gate == 1.0


def test_the_gate_is_the_mean_over_all_coordinates_at_the_sampled_step():
    params = parameters()
    optimizer = PopRiskAdamW([{"params": [params[0]], "gate": "none"}, {"params": [params[1]]}])
    clock = GateClock(optimizer, "cpu")
    clock.update()
    assert clock.gate == 1.0  # no sample yet
    for index in range(10):
        if index == 8:
            clock.sample()
        step(optimizer, params, index)
        if index == 8:
            clock.end_step()
            stats = optimizer.gate_stats()
    clock.update()
    by_group = [float(stats[f"group{i}/mean_gate"]) for i in (0, 1)]
    assert by_group[0] == 1.0
    assert 0.0 < by_group[1] < 1.0
    assert clock.gate == pytest.approx((5 * by_group[0] + 300 * by_group[1]) / 305)


@pytest.mark.parametrize("period", [0, 3])
def test_sampling_leaves_training_and_the_users_period_alone(period):
    seen = []
    for has_clock in (False, True):
        params = parameters()
        optimizer = PopRiskAdamW(params, collect_stats_every=period)
        clock, samples = GateClock(optimizer, "cpu"), []
        for index in range(12):
            is_sampled = has_clock and index in (4, 7)
            if is_sampled:
                clock.sample()
                clock.sample()  # e.g. by mistake
            step(optimizer, params, index)
            if is_sampled:
                clock.end_step()
            assert optimizer.param_groups[0]["collect_stats_every"] == period
            if period and index % period == 0:
                samples.append(float(optimizer.gate_stats()["mean_gate"]))
        seen.append((samples, [p.detach() for p in params], optimizer.state_dict()["param_groups"]))
    assert seen[0][0] == seen[1][0]
    assert seen[0][2] == seen[1][2]
    assert all(torch.equal(a, b) for a, b in zip(seen[0][1], seen[1][1], strict=True))


def test_training_time_is_that_of_the_last_window_s_gate():
    params = parameters()
    optimizer = PopRiskAdamW(params, lr=0.5)
    reader = GradientReader(optimizer, 4)
    times = []
    for index in range(12):
        noise(params, index)
        reader.read(optimizer)
        optimizer.step()
        times.append(reader.take_lr())
        if reader.window.is_full:
            sampled = float(optimizer.gate_stats()["mean_gate"])
            reader.close()
            assert reader.clock.gate == pytest.approx(sampled)
    assert times[:4] == [0.5] * 4
    assert len(set(times[4:8])) == len(set(times[8:])) == 1
    assert 0.0 < times[4] < 0.5
    assert times[8] != times[4]


def test_release_gives_the_period_back():
    params = parameters()
    optimizer = PopRiskAdamW(params)
    reader = GradientReader(optimizer, 4)
    for index in range(4):
        noise(params, index)
        reader.read(optimizer)
    assert optimizer.param_groups[0]["collect_stats_every"] == 1  # and an exception in the step
    reader.release()
    assert optimizer.param_groups[0]["collect_stats_every"] == 0

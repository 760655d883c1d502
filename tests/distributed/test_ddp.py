"""DDP, alone and with torch's ZeroRedundancyOptimizer, against one process on the joined batch."""

import copy

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from poprisk_integrations import PopRiskAdamW
from tests.helpers.sharding_problem import (
    OPTIONS,
    STEPS,
    assert_same,
    default_optimizer,
    make_model,
    run_alone,
    share,
    snapshot,
    train,
    two_groups,
    whole,
)

pytestmark = pytest.mark.distributed


def ddp(rank, world_size, folder):
    runs = {}
    for name, dtype in (("float32", torch.float32), ("float64", torch.float64)):
        model = make_model(dtype)
        optimizer = default_optimizer(model)
        train(DistributedDataParallel(model), optimizer, share(rank, world_size))
        runs[name] = snapshot(model, optimizer)
    return runs


def ddp_one_bad_rank(rank, world_size, folder):
    """One element of one rank's own gradient is NaN before DDP averages it."""
    model = make_model()
    optimizer = default_optimizer(model)
    step = 0

    def spoil(grad):
        nonlocal step
        step += 1
        if step == 6 and rank == 1:
            grad = grad.clone()
            grad.view(-1)[3] = float("nan")
        return grad

    model[0].weight.register_hook(spoil)
    train(DistributedDataParallel(model), optimizer, share(rank, world_size))
    return {"skipped": optimizer.skipped_nonfinite, **snapshot(model, optimizer)}


def make_zero(model):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(two_groups(model), optimizer_class=PopRiskAdamW, **OPTIONS)


def zero(rank, world_size, folder):
    """ZeRO-1 with a checkpoint in the middle, loaded into a new model and optimizer."""
    rows = share(rank, world_size)
    model = make_model()
    optimizer = make_zero(model)
    train(DistributedDataParallel(model), optimizer, rows, stop=8)
    optimizer.consolidate_state_dict(to=0)
    # a copy: loading shares tensors with what it is given
    saved = [copy.deepcopy(optimizer.state_dict()) if rank == 0 else None]
    torch.distributed.broadcast_object_list(saved, src=0)

    resumed = make_model()
    resumed.load_state_dict(model.state_dict())
    second = make_zero(resumed)
    keys, count = sorted(saved[0]["state"][0]), len(saved[0]["state"])
    second.load_state_dict(saved[0])  # drops what other ranks own
    train(DistributedDataParallel(resumed), second, rows, start=8)
    train(DistributedDataParallel(model), optimizer, rows, start=8)
    return {
        "weights": [whole(p) for p in model.parameters()],
        "resumed": [whole(p) for p in resumed.parameters()],
        "saved_states": count,
        "own_states": len(optimizer.optim.state),
        "keys": keys,
        "steps": [float(s["step"]) for s in second.optim.state.values()],
    }


JOBS = {2: [ddp, ddp_one_bad_rank, zero]}


@pytest.mark.parametrize(("name", "rtol"), [("float32", 1e-6), ("float64", 1e-12)])
def test_ddp_equals_one_process(results, name, rtol):
    alone = run_alone(getattr(torch, name))
    for rank in results(2, ddp):
        assert_same(rank[name], alone, rtol)


def test_a_bad_gradient_on_one_rank_skips_the_step_on_all(results):
    first, second = results(2, ddp_one_bad_rank)
    assert first["skipped"] == second["skipped"] == 1
    assert first["step"] == [STEPS - 1.0] * 6
    assert_same(first, second, 0.0)


def test_zero_redundancy_optimizer_equals_one_process_and_resumes(results):
    ranks = results(2, zero)
    expected = run_alone()["weights"].values()
    for rank in ranks:
        for key in ("weights", "resumed"):
            for actual, value in zip(rank[key], expected, strict=True):
                torch.testing.assert_close(actual, value, rtol=1e-6, atol=1e-7)
        assert rank["keys"] == ["dev_step", "exp_avg", "exp_avg_sq", "exp_dev_sq", "step"]
        assert rank["saved_states"] == 6
        assert set(rank["steps"]) == {float(STEPS)}
    assert sum(r["own_states"] for r in ranks) == 6  # each rank holds its part only
    assert 0 < ranks[0]["own_states"] < 6

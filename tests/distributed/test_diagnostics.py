"""What is measured in training: shards and ranks against one process with the whole."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch import nn

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.diagnostics import GradientWindow, window_fits
from poprisk_integrations.diagnostics.gate_monitor import joint_mean
from poprisk_integrations.diagnostics.layer_sample import LayerSample
from poprisk_integrations.diagnostics.sitting_out import SittingOut
from poprisk_integrations.distributed import local_tensor
from tests.helpers.sharding_problem import share

pytestmark = pytest.mark.distributed


def mesh_of(world_size):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (world_size,))


# A window over gradients, in shards that are plain tensors or DTensors.

STEPS = 6
SIZES = (7, 90_000, 5, 4)  # one is sampled; the last never has a gradient


def history():
    """(weights, gradients) per step."""
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        weights = [torch.randn(n, generator=generator) for n in SIZES]
        grads = [torch.randn(n, generator=generator) + 0.1 for n in SIZES[:3]]
        if step == 2:
            grads[0][-1] = float("nan")  # on the last rank alone, in a tensor that is read whole
        yield weights, [*grads, None]


def measure(accumulator, params, cut, group=None):
    window = GradientWindow(STEPS, accumulator=accumulator, shard_group=group)
    for weights, grads in history():
        for position, (p, w) in enumerate(zip(params, weights, strict=True)):
            local_tensor(p).copy_(cut(position, w))
        window.add(
            params,
            grads=[
                None if g is None else like(p, cut(i, g))
                for i, (p, g) in enumerate(zip(params, grads, strict=True))
            ],
        )
    assert window_fits(window.state_dict(), [p.requires_grad_() for p in params], group)
    return dataclasses.asdict(window.close())


def like(param, local):
    """The local shard as a gradient of its parameter."""
    if local.numel() == 0:
        return None  # FSDP1 has no gradient where it has no shard
    if not hasattr(param, "device_mesh"):
        return local
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(local, param.device_mesh, param.placements, run_check=False)


def plain_shards(rank, world_size, folder):
    ends = [[0, n if n == 5 else n // 3, n] for n in SIZES]  # rank 1 has no part of one

    def cut(position, tensor):
        return tensor[ends[position][rank] : ends[position][rank + 1]].clone()

    return {
        accumulator: measure(
            accumulator,
            [cut(i, torch.zeros(n)) for i, n in enumerate(SIZES)],
            cut,
            dist.group.WORLD,
        )
        for accumulator in ("exact", "sample")
    }


def dtensors(rank, world_size, folder):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = mesh_of(world_size)
    placements = [[Shard(0)], [Shard(0)], [Replicate()], [Shard(0)]]

    def distribute(position, tensor):
        return distribute_tensor(tensor, mesh, placements[position])

    return {
        accumulator: measure(
            accumulator,
            [distribute(i, torch.zeros(n)) for i, n in enumerate(SIZES)],
            lambda position, tensor: local_tensor(distribute(position, tensor)).clone(),
        )
        for accumulator in ("exact", "sample")
    }


@pytest.mark.parametrize("accumulator", ["exact", "sample"])
@pytest.mark.parametrize("job", [plain_shards, dtensors])
def test_a_window_over_shards_is_one_over_the_whole(results, job, accumulator):
    whole = measure("exact", [torch.zeros(n) for n in SIZES], lambda _, tensor: tensor)
    assert whole["steps"] == STEPS - 1
    assert whole["per_tensor"].isnan().tolist() == [False, False, False, True]
    ranks = [rank[accumulator] for rank in results(2, job)]
    for result in ranks:
        tolerance = 1e-5 if accumulator == "exact" else 0.02
        assert result["ratio"] == pytest.approx(whole["ratio"], rel=tolerance)
        if accumulator == "exact":  # the spread of five norms of a sample is another draw
            assert result["ratio_se"] == pytest.approx(whole["ratio_se"], rel=1e-3)
        assert torch.allclose(result["noise"], whole["noise"], rtol=tolerance)
        # The shards draw other coordinates than the whole does.
        assert result["risk_decrease"] == pytest.approx(
            whole["risk_decrease"], abs=whole["risk_decrease_se"] * 3
        )
        assert str(result) == str(ranks[0])  # the same bits: all ranks decide alike


# Statistics of the gate by layer.


class Net(nn.Module):
    """Two blocks and a head; the head's bias has one element, so that one shard is empty."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(5, 7), nn.Linear(7, 7)])
        self.head = nn.Linear(7, 1)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(x)


def statistics(model, rows, forward=None):
    optimizer = PopRiskAdamW(model.parameters(), lr=1e-2, collect_stats_every=1)
    sample = LayerSample(optimizer, model.named_parameters(), True)
    generator = torch.Generator().manual_seed(1)
    for _ in range(12):
        x, y = (torch.randn(12, d, generator=generator) for d in (5, 1))
        optimizer.zero_grad()
        nn.functional.mse_loss((forward or model)(x[rows]), y[rows]).backward()
        sample.before_step()
        optimizer.step()
        sample.after_step()
    _, sums = joint_mean([optimizer.gate_sums(), sample.sums()], torch.device("cpu"))
    return sample.metrics(sums)


def ddp(rank, world_size, folder):
    model = Net()
    wrapped = nn.parallel.DistributedDataParallel(model)
    return statistics(model, share(rank, world_size), wrapped)


def fsdp2(rank, world_size, folder):
    from torch.distributed.fsdp import fully_shard

    model, mesh = Net(), mesh_of(world_size)
    for layer in (*model.layers, model):
        fully_shard(layer, mesh=mesh)
    return statistics(model, share(rank, world_size))


def shard_beside_whole(rank, world_size, folder):
    """A sharded and a whole parameter in one layer: each counts once."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh, source = mesh_of(world_size), torch.arange(1.0, 7).view(3, 2)
    shard = nn.Parameter(distribute_tensor(source, mesh, [Shard(0)]))
    plain = nn.Parameter(torch.ones(5))
    optimizer = PopRiskAdamW([shard, plain], lr=0.5)
    sample = LayerSample(optimizer, [("a.w", shard), ("a.b", plain)], True)
    for _ in range(2):
        shard.grad = distribute_tensor(source, mesh, [Shard(0)])
        plain.grad = torch.full((5,), 2.0)
        sample.before_step()
        optimizer.step()
        sample.after_step()
    (sums,) = joint_mean([sample.sums()], torch.device("cpu"))
    return {"counts": sums[:, 0].tolist(), **sample.metrics(sums)}


def collectives(rank, world_size, folder):
    from torch.distributed.tensor.debug import CommDebugMode

    with CommDebugMode() as mode:
        means = joint_mean([torch.full((2, 2), float(rank)), torch.ones(3)], torch.device("cpu"))
    return {"means": [mean.tolist() for mean in means], "count": mode.get_total_counts()}


@pytest.mark.parametrize("job", [ddp, fsdp2])
def test_layers_of_two_processes_are_those_of_one(results, job):
    alone = statistics(Net(), slice(None))
    assert {"layers.0/open_fraction", "head/signal_to_noise", "predicted_decrease"} <= set(alone)
    for rank in results(2, job):
        assert rank == pytest.approx(alone, rel=1e-3, abs=1e-5)


def test_shards_and_whole_tensors_count_alike(results):
    for rank in results(2, shard_beside_whole):
        assert rank["counts"] == [11.0, 0.0]
        # lr * |g|: constant gradients give u = 1, and the gate was open
        assert rank["predicted_decrease"] == pytest.approx(0.5 * (21 + 10), rel=1e-5)


def test_statistics_cost_one_collective(results):
    means = [[[0.5, 0.5], [0.5, 0.5]], [1.0, 1.0, 1.0]]
    assert results(2, collectives) == [{"means": means, "count": 1}] * 2


# Examples that sit out: two processes with half of the data each.

EXAMPLES, EPOCHS, BATCH = 96, 4, 16


def sitting_out(rank, world_size, folder):
    """The curve, and the state in the middle of the last epoch."""
    # As a script that seeds each rank differently.
    experiment = SittingOut(EXAMPLES, share=0.3, epochs=EPOCHS, seed=2 + rank)
    hard = torch.randn(EXAMPLES, generator=torch.Generator().manual_seed(0)).abs()
    state = None
    for epoch in range(EPOCHS):
        experiment.begin_epoch(epoch)
        generator = torch.Generator().manual_seed(epoch)
        losses = hard + torch.rand(EXAMPLES, generator=generator) / (1 + epoch)
        batches = torch.randperm(EXAMPLES, generator=generator).split(BATCH)
        for j, both in enumerate(batches):
            index = both[rank::world_size]
            values = {"loss": losses[index]}
            if rank == 0:  # a metric that one rank alone has: half of the examples lack it
                values["half"] = losses[index]
            experiment.record(index, values, position=j / len(batches))
            experiment.visited(index[~experiment.sits()[index]], j / len(batches))
            if epoch == EPOCHS - 1 and j == 2:
                experiment.join()
                state = experiment.state_dict()
            if experiment.window_ends((j + 1) / len(batches)):
                experiment.close_window(step=epoch * len(batches) + j + 1)
    return {"history": experiment.history, "state": state}


def test_the_curve_of_sitters_is_that_of_one_process(results):
    first, second = results(2, sitting_out)
    alone = sitting_out(0, 1, None)["history"]
    assert first["history"] == second["history"]
    for row, expected in zip(first["history"], alone, strict=True):
        for key in row:
            if "loss" in key or "gap" in key:
                assert row[key] == pytest.approx(expected[key], rel=1e-6), key
    assert first["history"][0]["estimated_test_half"] is not None


def test_after_joining_the_states_of_sitters_are_equal(results):
    first, second = (rank["state"] for rank in results(2, sitting_out))
    assert first["history"] == second["history"]
    for name in ("visited", "open_places", "open_visits", "residuals", "residual_ses", "open"):
        torch.testing.assert_close(first[name], second[name], equal_nan=True, rtol=0, atol=0)


JOBS = {2: [plain_shards, dtensors, ddp, fsdp2, shard_beside_whole, collectives, sitting_out]}

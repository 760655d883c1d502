"""Statistics by layer of two gloo processes equal those of one, in one collective."""

import pytest
import torch
from torch import nn

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.diagnostics.joint_mean import joint_mean
from poprisk_integrations.diagnostics.layer_sample import LayerSample

pytestmark = pytest.mark.distributed

STEPS, BATCH = 12, 8


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


def train(model, rows, forward=None):
    optimizer = PopRiskAdamW(model.parameters(), lr=1e-2, collect_stats_every=1)
    sample = LayerSample(optimizer, model.named_parameters(), True)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x, y = (torch.randn(BATCH, d, generator=generator) for d in (5, 1))
        optimizer.zero_grad()
        nn.functional.mse_loss((forward or model)(x[rows]), y[rows]).backward()
        sample.before_step()
        optimizer.step()
        sample.after_step()
    _, sums = joint_mean([optimizer.gate_sums(), sample.sums()], torch.device("cpu"))
    return sample.metrics(sums)


def rows_of(rank, world_size):
    size = BATCH // world_size
    return slice(rank * size, (rank + 1) * size)


def ddp(rank, world_size, folder):
    model = Net()
    wrapped = nn.parallel.DistributedDataParallel(model)
    return train(model, rows_of(rank, world_size), wrapped)


def fsdp2(rank, world_size, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world_size,))
    model = Net()
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return train(model, rows_of(rank, world_size))


def mixed(rank, world_size, folder):
    """A sharded and a whole parameter in one layer: each counts once."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world_size,))
    source = torch.arange(1.0, 7).view(3, 2)
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
    return {"sums": sums, **sample.metrics(sums)}


def collectives(rank, world_size, folder):
    from torch.distributed.tensor.debug import CommDebugMode

    with CommDebugMode() as mode:
        means = joint_mean([torch.full((2, 2), float(rank)), torch.ones(3)], torch.device("cpu"))
    return {"means": means, "count": mode.get_total_counts()}


JOBS = {2: [ddp, fsdp2, mixed, collectives]}


@pytest.mark.parametrize("job", [ddp, fsdp2])
def test_two_processes_equal_one(results, job):
    alone = train(Net(), slice(None))
    assert {"layers.0/open_fraction", "head/signal_to_noise", "predicted_decrease"} <= set(alone)
    for rank in results(2, job):
        assert rank == pytest.approx(alone, rel=1e-3, abs=1e-5)


def test_shards_and_whole_tensors_count_alike(results):
    for rank in results(2, mixed):
        assert rank["sums"][:, 0].tolist() == [11.0, 0.0]
        # lr * |g|: constant gradients give u = 1, and the gate was open
        assert rank["predicted_decrease"] == pytest.approx(0.5 * (21 + 10), rel=1e-5)


def test_one_collective(results):
    for rank in results(2, collectives):
        assert rank["count"] == 1
        assert rank["means"][0].tolist() == [[0.5, 0.5], [0.5, 0.5]]
        assert rank["means"][1].tolist() == [1.0, 1.0, 1.0]

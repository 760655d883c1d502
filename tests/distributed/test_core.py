"""Two gloo processes against one process on the joined batch, below any framework."""

import pytest
import torch
from torch import nn

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.core import StoppingRule
from poprisk_integrations.diagnostics import GradientWindow
from poprisk_integrations.distributed import local_tensor, mean_over_ranks
from tests.helpers.gloo import spawn_gloo

pytestmark = pytest.mark.distributed

STEPS, BATCH = 24, 8


def make_model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def batches():
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(BATCH, 5, generator=generator), torch.randn(BATCH, 3, generator=generator))
        for _ in range(STEPS)
    ]


def train(model, rows, options, bad_step=None, rank=0, forward=None):
    """Train on the given rows of each batch; returns what a rank saw of the run."""
    optimizer = PopRiskAdamW(model.parameters(), lr=1e-2, collect_stats_every=1, **options)
    window, rule = GradientWindow(steps=6), StoppingRule()
    dtype = next(model.parameters()).dtype
    ratios = []
    for step, (x, y) in enumerate(batches()):
        out = (forward or model)(x[rows].to(dtype))
        nn.functional.mse_loss(out, y[rows].to(dtype)).backward()
        if step == bad_step and rank == 0:  # one shard is enough to skip the step everywhere
            local_tensor(model[0].weight.grad).view(-1)[0] = float("nan")
        window.add(list(model.parameters()))
        optimizer.step()
        optimizer.zero_grad()
        ratio = None
        if window.is_full:
            ratio = window.close().ratio
            ratios.append(ratio)
        rule.update(step=step + 1, lr=1e-2, ratio=ratio)
    return optimizer, ratios, rule


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def summary(model, optimizer, ratios, rule):
    sums = optimizer.gate_sums()
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    return {
        "weights": [full(p.detach()).clone() for p in model.parameters()],
        "noise": [full(optimizer.state[p]["exp_dev_sq"]).clone() for p in model.parameters()],
        "ratios": ratios,
        "state": rule.state_dict(),
        "stats": {k: float(v) for k, v in optimizer.gate_stats(sums).items()},
        "skipped": optimizer.skipped_nonfinite,
    }


def ddp_rank(rank, world_size, options):
    model = make_model()
    wrapped = nn.parallel.DistributedDataParallel(model)
    size = BATCH // world_size
    rows = slice(rank * size, (rank + 1) * size)
    return summary(model, *train(model, rows, options, forward=wrapped))


def fsdp2_rank(rank, world_size, options, dtype, bad_step):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world_size,))
    model = make_model(dtype)
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    size = BATCH // world_size
    rows = slice(rank * size, (rank + 1) * size)
    return summary(model, *train(model, rows, options, bad_step, rank))


def compare(ranks, single, tolerance=1e-6):
    for result in ranks:
        for key in ("weights", "noise"):
            for a, b in zip(result[key], single[key], strict=True):
                assert float((a.float() - b.float()).abs().max()) < tolerance, key
        assert result["ratios"] == pytest.approx(single["ratios"], rel=1e-4)
        assert result["ratios"] == ranks[0]["ratios"]  # the same bits: all ranks decide alike
        assert result["state"] == ranks[0]["state"]
        assert result["stats"] == pytest.approx(single["stats"], rel=1e-3, abs=2e-2)


@pytest.mark.parametrize("options", [{}, {"foreach": True, "preserve_norm": True}], ids=str)
def test_ddp_equals_one_process(options):
    model = make_model()
    compare(spawn_gloo(2, ddp_rank, options), summary(model, *train(model, slice(None), options)))


@pytest.mark.parametrize(
    "options",
    [{"preserve_norm": True}, {"foreach": True, "preserve_norm": True}, {"capturable": True}],
    ids=str,
)
def test_fsdp2_equals_one_process_and_skips_together(options):
    ranks = spawn_gloo(2, fsdp2_rank, options, torch.float32, 5)
    model = make_model()
    compare(ranks, summary(model, *train(model, slice(None), options, bad_step=5)))
    assert [r["skipped"] for r in ranks] == [1, 1]


def rounding_rank(rank, world_size):
    """The same source rounded whole and in shards of either dimension."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from poprisk_integrations.optim._rounding import (
        global_index,
        round_to_bfloat16_,
        rounding_key,
        uniform16,
    )

    mesh = init_device_mesh("cpu", (world_size,))
    source = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    results = []
    for dim in (None, 0, 1):
        owner = torch.zeros(5, 7, dtype=torch.bfloat16)
        piece = source
        if dim is not None:
            owner = distribute_tensor(owner, mesh, [Shard(dim)])
            piece = local_tensor(distribute_tensor(source, mesh, [Shard(dim)]))
        key = rounding_key(torch.tensor(4.0), 3, 0)
        draw = uniform16(global_index(owner, piece), key, "param")
        round_to_bfloat16_(local_tensor(owner), piece, draw)
        results.append(full(owner))
    return results


def test_rounding_does_not_depend_on_the_sharding():
    for whole, rows, columns in spawn_gloo(3, rounding_rank):
        assert torch.equal(whole, rows)
        assert torch.equal(whole, columns)


def mean_rank(rank, world_size):
    return mean_over_ranks(torch.tensor([float(rank), 1.0]))


def test_mean_over_ranks():
    for result in spawn_gloo(2, mean_rank):
        assert result.tolist() == [0.5, 1.0]
    assert mean_over_ranks(torch.tensor([3.0])).tolist() == [3.0]

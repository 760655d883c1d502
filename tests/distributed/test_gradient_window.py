"""A window over shards of plain tensors and of DTensors against one process with the whole."""

import dataclasses

import pytest
import torch
import torch.distributed as dist

from poprisk_integrations.diagnostics import GradientWindow, window_fits
from poprisk_integrations.distributed import local_tensor
from tests.helpers.gloo import spawn_gloo

pytestmark = pytest.mark.distributed

STEPS = 6
SIZES = (7, 90_000, 5, 4)  # one is sampled; the last never has a gradient


def history():
    """(weights, gradients) per step."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for step in range(STEPS):
        weights = [torch.randn(n, generator=generator) for n in SIZES]
        grads = [torch.randn(n, generator=generator) + 0.1 for n in SIZES[:3]]
        if step == 2:
            grads[0][-1] = float("nan")  # on the last rank alone, in a tensor that is read whole
        rows.append((weights, [*grads, None]))
    return rows


def measure(window, params, cut):
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
    assert window_fits(window.state_dict(), [p.requires_grad_() for p in params], window.group)
    return dataclasses.asdict(window.close())


def like(param, local):
    """The local shard as a gradient of its parameter."""
    if local.numel() == 0:
        return None  # FSDP1 has no gradient where it has no shard
    if not hasattr(param, "device_mesh"):
        return local
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(local, param.device_mesh, param.placements, run_check=False)


class Window(GradientWindow):
    """Remembers its group for the test."""

    def __init__(self, accumulator, group=None):
        super().__init__(STEPS, accumulator=accumulator, shard_group=group)
        self.group = group


def plain_rank(rank, world_size, accumulator):
    ends = [(n, [0, n if n == 5 else n // 3, n]) for n in SIZES]  # rank 1 has no part of one

    def cut(position, tensor):
        _, edges = ends[position]
        return tensor[edges[rank] : edges[rank + 1]].clone()

    params = [cut(i, torch.zeros(n)) for i, n in enumerate(SIZES)]
    return measure(Window(accumulator, dist.group.WORLD), params, cut)


def dtensor_rank(rank, world_size, accumulator):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world_size,))
    placements = [[Shard(0)], [Shard(0)], [Replicate()], [Shard(0)]]
    params = [
        distribute_tensor(torch.zeros(n), mesh, place)
        for n, place in zip(SIZES, placements, strict=True)
    ]

    def cut(position, tensor):
        return local_tensor(distribute_tensor(tensor, mesh, placements[position])).clone()

    return measure(Window(accumulator), params, cut)


@pytest.mark.parametrize("accumulator", ["exact", "sample"])
@pytest.mark.parametrize("worker", [plain_rank, dtensor_rank])
def test_shards_equal_the_whole(worker, accumulator):
    whole = measure(Window("exact"), [torch.zeros(n) for n in SIZES], lambda _, t: t)
    assert whole["steps"] == STEPS - 1
    assert whole["per_tensor"].isnan().tolist() == [False, False, False, True]
    ranks = spawn_gloo(2, worker, accumulator)
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

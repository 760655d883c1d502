"""Gates of rows and tensors, and noise read off the moments, on two processes as on one."""

import pytest
import torch
from torch import nn

from poprisk_integrations import PopRiskAdamW
from tests.helpers.sharding_problem import (
    assert_same,
    gated_optimizer,
    make_model,
    shard_with_fsdp2,
    share,
    snapshot,
    train,
    whole,
    wrap_with_fsdp1,
)

pytestmark = pytest.mark.distributed

GRAINS = {
    "rows": {"granularity": "row", "foreach": True},
    "tensors": {"granularity": "tensor"},
    "rows of moments": {"granularity": "row", "noise_source": "moments"},
    "tensors of moments": {
        "granularity": "tensor",
        "noise_source": "moments",
        "capturable": True,
        "collect_stats_every": 1,
    },
    "moments": {"noise_source": "moments"},
}


def mesh_of(world_size):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (world_size,))


def fsdp2_by_grains(rank, world_size, folder):
    """Rows are whole on each rank; tensors, of which some have nothing on one rank, are not."""
    from torch.distributed.tensor.debug import CommDebugMode

    runs, mesh = {}, mesh_of(world_size)
    for path, options in GRAINS.items():
        model = shard_with_fsdp2(make_model(), mesh)
        optimizer = gated_optimizer(model, **options)
        train(model, optimizer, share(rank, world_size))
        runs[path] = snapshot(model, optimizer)
        (model(torch.ones(3, 5)) ** 2).mean().backward()
        with CommDebugMode() as in_step:
            optimizer.step()
        runs[path]["collectives"] = in_step.get_total_counts()
        sums = optimizer.gate_sums()
        torch.distributed.all_reduce(sums)
        runs[path]["sums"] = sums[:, :8]
    return runs


def rows_by_columns(rank, world_size, folder):
    """A matrix that is whole, and sharded in either dimension: the gates of its rows."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh, results = mesh_of(world_size), {}
    grads = torch.randn(6, 5, 7, generator=torch.Generator().manual_seed(0))
    for grain in ("row", "tensor"):
        for placement in (Replicate(), Shard(0), Shard(1)):
            start = torch.ones(5, 7)
            param = nn.Parameter(distribute_tensor(start, mesh, [placement]))
            optimizer = PopRiskAdamW([param], lr=1e-2, granularity=grain, collect_stats_every=1)
            for grad in grads:
                param.grad = distribute_tensor(grad, mesh, [placement])
                optimizer.step()
            results.setdefault(grain, []).append(whole(param))
    return results


def grain_of_flat_parameters(rank, world_size, folder):
    """FSDP1 flattens: refused in the constructor, by the option's name."""
    said = {}
    for use_orig_params in (True, False):
        model = wrap_with_fsdp1(make_model(), use_orig_params)
        try:
            PopRiskAdamW(model.parameters(), granularity="row")
        except ValueError as error:
            said[use_orig_params] = str(error)
    return said


JOBS = {2: [fsdp2_by_grains, rows_by_columns, grain_of_flat_parameters]}


def test_gates_of_rows_and_tensors_equal_those_of_one_process(results):
    """One collective for the verdict, and one more for all tensors where they are not whole."""
    for rank in results(2, fsdp2_by_grains):
        for path, options in GRAINS.items():
            model = make_model()
            optimizer = gated_optimizer(model, **options)
            train(model, optimizer)
            assert_same(rank[path], snapshot(model, optimizer), 2e-6)
            per_tensor = options.get("granularity") == "tensor"
            assert rank[path]["collectives"] == 1 + per_tensor, path
            (model(torch.ones(3, 5)) ** 2).mean().backward()
            optimizer.step()
            sums = optimizer.gate_sums()[:, :8]
            torch.testing.assert_close(rank[path]["sums"], sums, rtol=1e-4, atol=1e-6)


def test_rows_that_are_cut_in_the_other_dimension_are_added_up(results):
    for rank in results(2, rows_by_columns):
        for alone, by_rows, by_columns in rank.values():
            torch.testing.assert_close(by_rows, alone, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(by_columns, alone, rtol=1e-6, atol=1e-7)
        assert not torch.equal(rank["row"][0], rank["tensor"][0])


def test_rows_of_flat_parameters_are_refused(results):
    for rank in results(2, grain_of_flat_parameters):
        assert all("Invalid granularity: 'row'" in rank[flag] for flag in (True, False))

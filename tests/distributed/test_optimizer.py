"""DDP, ZeRO-1, FSDP1, FSDP2 and HSDP against one process: updates, checkpoints, skips, statistics.

On 2 ranks FSDP2 has one dimension, on 4 it is HSDP: replicas of shards.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.distributed import local_tensor, mean_over_ranks
from tests.helpers.sharding_problem import (
    OPTIONS,
    STATES,
    STEPS,
    assert_same,
    fsdp1_weights,
    gated_optimizer,
    local_sizes,
    make_model,
    run_alone,
    shard_with_fsdp2,
    share,
    snapshot,
    train,
    two_groups,
    whole,
    wrap_with_fsdp1,
)

pytestmark = pytest.mark.distributed

PATHS = {
    "single_tensor": {},
    "foreach": {"foreach": True, "preserve_norm": True},
    "capturable": {"capturable": True},
    "float64": {},
}
FLOAT32 = {path: options for path, options in PATHS.items() if path != "float64"}
ROUNDED = {**FLOAT32, "bfloat16 states": {"state_dtype": "bfloat16"}}
MIDDLE = 8


def of_world(paths, world_size):
    """Four processes are slow on few cores; replicas of shards are a mesh of their own, no path."""
    return paths if world_size == 2 else {p: paths[p] for p in ("single_tensor", "foreach")}


def dtype_of(path):
    return torch.float64 if path == "float64" else torch.float32


def mesh_of(world_size):
    from torch.distributed.device_mesh import init_device_mesh

    if world_size == 4:
        return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh("cpu", (world_size,))


def ddp(rank, world_size, folder):
    runs = {}
    for path, options in PATHS.items():
        model = make_model(dtype_of(path))
        optimizer = gated_optimizer(model, **options)
        train(DistributedDataParallel(model), optimizer, share(rank, world_size))
        runs[path] = snapshot(model, optimizer)
    return runs


def fsdp2(rank, world_size, folder):
    runs, mesh = {}, mesh_of(world_size)
    for path, options in of_world(PATHS, world_size).items():
        model = shard_with_fsdp2(make_model(dtype_of(path)), mesh)
        optimizer = gated_optimizer(model, **options)
        train(model, optimizer, share(rank, world_size))
        runs[path] = snapshot(model, optimizer)
        state, param = optimizer.state[model[0].weight], model[0].weight
        runs["layouts"] = {str(t.placements) for t in (param, *(state[k] for k in STATES))}
    return {**runs, "sizes": local_sizes(model)}


def ddp_with_a_bad_rank(rank, world_size, folder):
    """One element of one rank's own gradient is NaN before DDP averages it."""
    model, step = make_model(), 0
    optimizer = gated_optimizer(model)

    def spoil(grad):
        nonlocal step
        step += 1
        return grad + float("nan") if step == 6 and rank == 1 else grad

    model[0].bias.register_hook(spoil)
    train(DistributedDataParallel(model), optimizer, share(rank, world_size))
    return {"single_tensor": {"skipped": optimizer.skipped_nonfinite, **snapshot(model, optimizer)}}


def fsdp2_with_a_bad_shard(rank, world_size, folder):
    """A NaN in one rank's shard only; on 4 ranks in both replicas of it, as HSDP leaves it."""
    runs, mesh = {}, mesh_of(world_size)
    for path, options in of_world(FLOAT32, world_size).items():
        model = shard_with_fsdp2(make_model(), mesh)
        optimizer = gated_optimizer(model, **options)

        def spoil(step, model=model):
            if step == 5 and mesh.get_local_rank(mesh.ndim - 1) == 0:
                local_tensor(model[0].weight.grad).view(-1)[0] = float("nan")

        train(model, optimizer, share(rank, world_size), before_step=spoil)
        runs[path] = {"skipped": optimizer.skipped_nonfinite, **snapshot(model, optimizer)}
    return runs


def train_on_given_gradients(model, optimizer, distribute=lambda grad, param: grad):
    """The same full bfloat16 gradients for every layout."""
    generator = torch.Generator().manual_seed(2)
    shapes = [p.shape for p in make_model().parameters()]
    for _ in range(10):
        for param, shape in zip(model.parameters(), shapes, strict=True):
            grad = torch.randn(shape, generator=generator) + 0.5
            param.grad = distribute(grad.to(param.dtype), param)
        optimizer.step()


def rounded(rank, world_size, folder):
    from torch.distributed.tensor import distribute_tensor

    runs, mesh = {}, mesh_of(world_size)
    for path, options in of_world(ROUNDED, world_size).items():
        model = shard_with_fsdp2(make_model(torch.bfloat16), mesh)
        optimizer = gated_optimizer(model, **options)
        train_on_given_gradients(
            model,
            optimizer,
            lambda grad, param: distribute_tensor(grad, param.device_mesh, param.placements),
        )
        runs[path] = snapshot(model, optimizer)
        runs["shards"] = [local_tensor(p).detach().clone() for p in model.parameters()]
    return {**runs, "shard_index": mesh.get_local_rank(mesh.ndim - 1)}


def rounded_by_columns(rank, world_size, folder):
    """One step of a bfloat16 matrix that is whole, and sharded in either dimension."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh, results = mesh_of(world_size), []
    start, grad = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).bfloat16()
    for placement in (Replicate(), Shard(0), Shard(1)):
        param = nn.Parameter(distribute_tensor(start.clone(), mesh, [placement]))
        param.grad = distribute_tensor(grad, mesh, [placement])
        optimizer = PopRiskAdamW([("weight", param)], lr=1e-2)
        optimizer.step()
        results.append(whole(param))
    return results


def statistics(rank, world_size, folder):
    from torch.distributed.tensor.debug import CommDebugMode

    model = shard_with_fsdp2(make_model(), mesh_of(world_size))
    optimizer = gated_optimizer(model, collect_stats_every=1)
    train(model, optimizer, share(rank, world_size))
    (model(torch.ones(3, 5)) ** 2).mean().backward()
    with CommDebugMode() as in_step:
        optimizer.step()
    with CommDebugMode() as in_sums:
        sums = optimizer.gate_sums()
        torch.distributed.all_reduce(sums)
    return {
        "sums": sums,
        "stats": {k: float(v) for k, v in optimizer.gate_stats(sums).items()},
        "collectives": [in_step.get_total_counts(), in_sums.get_total_counts()],
    }


def swapped(rank, world_size, folder):
    """What accelerate does: the optimizer is built first, and gets the sharded parameters later."""
    accelerate = pytest.importorskip("accelerate.utils.fsdp_utils")
    model = make_model()
    optimizer = gated_optimizer(model)
    names = {p.data_ptr(): n for n, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for i, param in enumerate(group["params"]):
            group["params"][i] = torch.empty(1, dtype=param.dtype)
            group["params"][i].data_ptr = param.data_ptr()
    shard_with_fsdp2(model, mesh_of(world_size))
    new = dict(model.named_parameters())
    mapping = {pointer: new[name] for pointer, name in names.items()}
    accelerate.fsdp2_switch_optimizer_parameters(optimizer, mapping)
    # AcceleratedOptimizer sends the state through state_dict() when it wraps
    optimizer.load_state_dict(optimizer.state_dict())
    assert not optimizer.state
    train(model, optimizer, share(rank, world_size))
    return {"count": len(optimizer.state), **snapshot(model, optimizer)}


def refusal_of(optimizer, state):
    try:
        optimizer.load_state_dict(state)
    except ValueError as error:
        return str(error)
    return "accepted"


def plain_states_refused(rank, world_size, folder):
    """Rank-local plain states under sharded parameters: refused before anything changes."""
    model = shard_with_fsdp2(make_model(), mesh_of(world_size))
    optimizer = gated_optimizer(model)
    train(model, optimizer, share(rank, world_size), stop=3)
    before, saved, said = snapshot(model, optimizer), optimizer.state_dict(), {}
    for name, of in (("shard", local_tensor), ("whole", whole)):
        states = {
            i: {k: of(v) if k in STATES else v for k, v in state.items()}
            for i, state in saved["state"].items()
        }
        said[name] = refusal_of(optimizer, {**saved, "state": states})
    return {"said": said, "before": before, "after": snapshot(model, optimizer)}


def make_zero(model):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(two_groups(model), optimizer_class=PopRiskAdamW, **THIRD)


def zero(rank, world_size, folder):
    """ZeRO-1 with a checkpoint in the middle, loaded into a new model and optimizer."""
    model, rows = make_model(), share(rank, world_size)
    optimizer = make_zero(model)
    train(DistributedDataParallel(model), optimizer, rows, stop=MIDDLE)
    optimizer.consolidate_state_dict(to=0)
    # a copy: loading shares tensors with what it is given
    saved = [copy.deepcopy(optimizer.state_dict()) if rank == 0 else None]
    torch.distributed.broadcast_object_list(saved, src=0)

    resumed = make_model()
    resumed.load_state_dict(model.state_dict())
    second = make_zero(resumed)
    keys = sorted(saved[0]["state"][0])
    second.load_state_dict(saved[0])  # drops what other ranks own
    for run, optim in ((resumed, second), (model, optimizer)):
        train(DistributedDataParallel(run), optim, rows, start=MIDDLE)
    return {
        "weights": {n: whole(p) for n, p in model.named_parameters()},
        "resumed": {n: whole(p) for n, p in resumed.named_parameters()},
        "keys": keys,
        "own": len(optimizer.optim.state),
        "dev_steps": {float(s["dev_step"]) for s in second.optim.state.values()},
    }


def one_group(model):
    return PopRiskAdamW(model.parameters(), weight_decay=0.1, **THIRD)


def fsdp1(rank, world_size, folder):
    """Train; load the state into a new run in the middle; go on with both."""
    from torch.distributed.fsdp import FullyShardedDataParallel as Fsdp

    runs, rows = {}, share(rank, world_size)
    for use_orig_params in (True, False):
        model = wrap_with_fsdp1(make_model(), use_orig_params)
        optimizer = one_group(model)
        train(model, optimizer, rows, stop=MIDDLE)
        saved = Fsdp.optim_state_dict(model, optimizer)

        resumed = make_model()
        resumed.load_state_dict(fsdp1_weights(model))
        resumed = wrap_with_fsdp1(resumed, use_orig_params)
        second = one_group(resumed)
        if use_orig_params:
            # On CPU, torch 2.13 gathers all states of a parameter into one buffer here and returns
            # the last one under each key (AdamW's too), so the rank's own state is loaded.
            second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        else:
            second.load_state_dict(Fsdp.optim_state_dict_to_load(resumed, second, saved))
        for run, optim in ((resumed, second), (model, optimizer)):
            train(run, optim, rows, start=MIDDLE)
        runs[use_orig_params] = {
            "weights": fsdp1_weights(model),
            "resumed": fsdp1_weights(resumed),
            "keys": sorted({k for state in saved["state"].values() for k in state}),
            "dev_steps": {float(s["dev_step"]) for s in second.state.values()},
        }
    return runs


def fsdp1_with_a_bad_shard(rank, world_size, folder):
    """A NaN that only rank 0 sees: flat parameters are plain tensors."""
    runs = {}
    for use_orig_params in (True, False):
        model = wrap_with_fsdp1(make_model(), use_orig_params)
        optimizer = one_group(model)

        def spoil(step, model=model):
            if step == 5 and rank == 0:
                grads = [p.grad for p in model.parameters() if p.grad is not None]
                grads[0].view(-1)[0] = float("nan")

        train(model, optimizer, share(rank, world_size), before_step=spoil)
        runs[use_orig_params] = {
            "skipped": optimizer.skipped_nonfinite,
            "steps": {float(s["step"]) for s in optimizer.state.values()},
            "weights": fsdp1_weights(model),
        }
    return runs


def fsdp1_of_another_world_size(rank, world_size, folder):
    """A rank-local state dict of 2 ranks does not fit the model on one."""
    runs = {}
    for use_orig_params in (True, False):
        model = wrap_with_fsdp1(make_model(), use_orig_params)
        optimizer = one_group(model)
        train(model, optimizer, share(rank, world_size), stop=3)
        alone = make_model()
        if not use_orig_params:  # one flat parameter per layer, the children first
            layers = [layer for layer in alone if isinstance(layer, nn.Linear)]
            flats = [torch.cat([p.flatten() for p in layer.parameters()]) for layer in layers]
            alone = nn.ParameterList([nn.Parameter(f.detach()) for f in flats])
        second, before = one_group(alone), [whole(p) for p in alone.parameters()]
        said = refusal_of(second, optimizer.state_dict())
        same = all(torch.equal(a, b) for a, b in zip(before, alone.parameters(), strict=True))
        runs[use_orig_params] = {"said": said, "is_untouched": same and not second.state}
    return runs


def mean(rank, world_size, folder):
    return mean_over_ranks(torch.tensor([float(rank), 1.0])).tolist()


JOBS = {
    2: [
        *(ddp, ddp_with_a_bad_rank, zero, fsdp1, fsdp1_with_a_bad_shard),
        *(fsdp1_of_another_world_size, fsdp2, fsdp2_with_a_bad_shard, rounded, rounded_by_columns),
        *(statistics, swapped, plain_states_refused, mean),
    ],
    4: [fsdp2, fsdp2_with_a_bad_shard, rounded, statistics],
}
THIRD = {**OPTIONS, "noise_source": "temporal"}
WORLDS = pytest.mark.parametrize("world_size", [2, 4], ids=["fsdp2", "hsdp"])
USE_ORIG_PARAMS = pytest.mark.parametrize("use_orig_params", [True, False], ids=["orig", "flat"])
KEYS = ["dev_step", "exp_avg", "exp_avg_sq", "exp_dev_sq", "step"]


@pytest.mark.parametrize(
    ("world_size", "job", "path"),
    [(w, job, p) for w, job in [(2, ddp), (2, fsdp2), (4, fsdp2)] for p in of_world(PATHS, w)],
)
def test_equals_one_process(results, world_size, job, path):
    ranks = results(world_size, job)
    expected = run_alone(dtype_of(path), **PATHS[path])
    for rank in ranks:
        assert_same(rank[path], expected, 1e-12 if path == "float64" else 1e-6)
    if job is fsdp2:
        assert all(len(rank["layouts"]) == 1 for rank in ranks)
        sizes = [rank["sizes"] for rank in ranks]
        assert any(0 in size for size in sizes), "no empty shard: the test lost its point"
        assert sizes[0] != sizes[1], "no uneven shard: the test lost its point"


@pytest.mark.parametrize(
    ("world_size", "job"),
    [(2, ddp_with_a_bad_rank), (2, fsdp2_with_a_bad_shard), (4, fsdp2_with_a_bad_shard)],
    ids=["ddp", "fsdp2", "hsdp"],
)
def test_a_bad_gradient_on_one_rank_skips_the_step_on_all(results, world_size, job):
    first, *others = results(world_size, job)
    for path, run in first.items():
        assert run["skipped"] == 1
        assert run["step"] == [STEPS - 1.0] * 6
        assert all(bool(w.isfinite().all()) for w in run["weights"].values())
        for rank in others:
            assert rank[path]["skipped"] == 1
            assert_same(rank[path], run, 0.0)


@WORLDS
def test_bfloat16_rounds_to_the_same_bits_as_one_process(results, world_size):
    for path, options in of_world(ROUNDED, world_size).items():
        model = make_model(torch.bfloat16)
        optimizer = gated_optimizer(model, **options)
        train_on_given_gradients(model, optimizer)
        for rank in results(world_size, rounded):
            assert_same(rank[path], snapshot(model, optimizer), 0.0)


def test_rounding_does_not_depend_on_the_dimension_of_the_shards(results):
    for replicated, rows, columns in results(2, rounded_by_columns):
        assert torch.equal(replicated, rows)
        assert torch.equal(replicated, columns)


def test_replicas_hold_the_same_bits(results):
    by_shard = {}
    for rank in results(4, rounded):
        by_shard.setdefault(rank["shard_index"], []).append(rank["shards"])
    assert sorted(by_shard) == [0, 1]
    for first, second in by_shard.values():
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@WORLDS
def test_gate_sums_add_up_and_cost_one_collective(results, world_size):
    model = make_model()
    optimizer = gated_optimizer(model, collect_stats_every=1)
    train(model, optimizer)
    (model(torch.ones(3, 5)) ** 2).mean().backward()
    optimizer.step()
    sums = world_size // 2 * optimizer.gate_sums()[:, :-1]  # of each replica
    stats = {k: float(v) for k, v in optimizer.gate_stats().items()}
    for rank in results(world_size, statistics):
        torch.testing.assert_close(rank["sums"][:, :-1], sums, rtol=1e-4, atol=1e-6)
        assert rank["stats"] == pytest.approx(stats, rel=1e-4, abs=1e-6)
        assert rank["collectives"] == [1, 1]


def test_parameters_swapped_after_construction(results):
    for rank in results(2, swapped):
        assert rank["count"] == 6
        assert_same(rank, run_alone(), 1e-6)


@pytest.mark.parametrize("kind", ["shard", "whole"])
def test_plain_states_under_sharded_parameters_are_refused(results, kind):
    for rank in results(2, plain_states_refused):
        assert "exp_avg" in rank["said"][kind]
        assert_same(rank["after"], rank["before"], 0.0)


def assert_weights(rank, expected):
    for key in ("weights", "resumed"):
        for name, value in expected.items():
            torch.testing.assert_close(rank[key][name], value, rtol=1e-6, atol=1e-7)


def test_zero_redundancy_optimizer_equals_one_process_and_resumes(results):
    ranks = results(2, zero)
    for rank in ranks:
        assert_weights(rank, run_alone()["weights"])
        assert rank["keys"] == KEYS
        assert rank["dev_steps"] == {STEPS - 1.0}
    assert sum(rank["own"] for rank in ranks) == 6  # each rank holds its part only
    assert 0 < ranks[0]["own"] < 6


@USE_ORIG_PARAMS
def test_fsdp1_equals_one_process_and_resumes(results, use_orig_params):
    expected = run_alone(make=one_group)["weights"]
    for rank in results(2, fsdp1):
        run = rank[use_orig_params]
        assert_weights(run, expected)
        assert run["keys"] == KEYS
        assert run["dev_steps"] == {STEPS - 1.0}


@USE_ORIG_PARAMS
def test_fsdp1_skips_a_bad_gradient_on_that_rank_alone(results, use_orig_params):
    """The documented limit: a flat shard is a plain tensor, which does not know its peers."""
    bad, other = (rank[use_orig_params] for rank in results(2, fsdp1_with_a_bad_shard))
    assert (bad["skipped"], other["skipped"]) == (1, 0)
    assert (bad["steps"], other["steps"]) == ({STEPS - 1.0}, {float(STEPS)})
    for run in (bad, other):
        assert all(bool(w.isfinite().all()) for w in run["weights"].values())


@USE_ORIG_PARAMS
def test_fsdp1_refuses_a_rank_local_state_of_another_world_size(results, use_orig_params):
    for rank in results(2, fsdp1_of_another_world_size):
        assert "Checkpoint does not fit" in rank[use_orig_params]["said"]
        assert rank[use_orig_params]["is_untouched"]


def test_mean_over_ranks(results):
    assert results(2, mean) == [[0.5, 1.0]] * 2
    assert mean_over_ranks(torch.tensor([3.0])).tolist() == [3.0]

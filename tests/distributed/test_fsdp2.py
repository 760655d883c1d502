"""FSDP2 and HSDP against one process: updates, rounding, skips, statistics, swapped parameters."""

import pytest
import torch

from poprisk_integrations.distributed import local_tensor
from tests.helpers.sharding_problem import (
    STATES,
    STEPS,
    assert_same,
    default_optimizer,
    local_sizes,
    make_model,
    run_alone,
    shard_with_fsdp2,
    share,
    snapshot,
    train,
    whole,
)

pytestmark = pytest.mark.distributed

PATHS = {"single_tensor": {}, "foreach": {"foreach": True}, "capturable": {"capturable": True}}


ROUNDED = {**PATHS, "bfloat16 states": {"state_dtype": "bfloat16"}}


def mesh_of(world_size):
    """One dimension on 2 ranks; replicas of shards (HSDP) on 4."""
    from torch.distributed.device_mesh import init_device_mesh

    if world_size == 4:
        return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh("cpu", (world_size,))


def sharded(rank, world_size, folder):
    runs, mesh = {}, mesh_of(world_size)
    cases = [(path, torch.float32, options) for path, options in PATHS.items()]
    for name, dtype, options in [*cases, ("float64", torch.float64, {})]:
        model = shard_with_fsdp2(make_model(dtype), mesh)
        optimizer = default_optimizer(model, **options)
        train(model, optimizer, share(rank, world_size))
        runs[name] = snapshot(model, optimizer)
        state = optimizer.state[model[0].weight]
        runs["layouts"] = [str(state[k].placements) for k in STATES]
        runs["parameter_layout"] = str(model[0].weight.placements)
    return {**runs, "sizes": local_sizes(model)}


def given_gradients(steps=10):
    """The same full bfloat16 gradients for every layout."""
    generator = torch.Generator().manual_seed(2)
    shapes = [p.shape for p in make_model().parameters()]
    return [[torch.randn(s, generator=generator) + 0.5 for s in shapes] for _ in range(steps)]


def train_on_given_gradients(model, optimizer, distribute=lambda grad, param: grad):
    for row in given_gradients():
        for param, grad in zip(model.parameters(), row, strict=True):
            param.grad = distribute(grad.to(param.dtype), param)
        optimizer.step()


def rounded(rank, world_size, folder):
    from torch.distributed.tensor import distribute_tensor

    runs, mesh = {}, mesh_of(world_size)
    for path, options in ROUNDED.items():
        model = shard_with_fsdp2(make_model(torch.bfloat16), mesh)
        optimizer = default_optimizer(model, **options)
        train_on_given_gradients(
            model,
            optimizer,
            lambda grad, param: distribute_tensor(grad, param.device_mesh, param.placements),
        )
        runs[path] = snapshot(model, optimizer)
        runs["shards"] = [local_tensor(p).detach().clone() for p in model.parameters()]
    return {**runs, "shard_index": mesh.get_local_rank(mesh.ndim - 1)}


def one_bad_shard(rank, world_size, folder):
    """A NaN in one rank's shard only; on 4 ranks in both replicas of it, as HSDP leaves it."""
    mesh = mesh_of(world_size)
    runs = {}
    for path, options in PATHS.items():
        model = shard_with_fsdp2(make_model(), mesh)
        optimizer = default_optimizer(model, **options)
        bad = mesh.get_local_rank(mesh.ndim - 1) == 0

        def spoil(step, model=model, bad=bad):
            if step == 5 and bad:
                local_tensor(model[0].weight.grad).view(-1)[0] = float("nan")

        train(model, optimizer, share(rank, world_size), before_step=spoil)
        runs[path] = {"skipped": optimizer.skipped_nonfinite, **snapshot(model, optimizer)}
    return runs


def statistics(rank, world_size, folder):
    from torch.distributed.tensor.debug import CommDebugMode

    model = shard_with_fsdp2(make_model(), mesh_of(world_size))
    optimizer = default_optimizer(model, collect_stats_every=1)
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
    optimizer = default_optimizer(model)
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
    empty = len(optimizer.state)
    train(model, optimizer, share(rank, world_size))
    owned = all(p in optimizer.state for p in model.parameters())
    return {"before": empty, "owned": owned, "count": len(optimizer.state)} | snapshot(
        model, optimizer
    )


def refused_states(rank, world_size, folder):
    """Rank-local plain states under sharded parameters: refused before anything changes."""
    model = shard_with_fsdp2(make_model(), mesh_of(world_size))
    optimizer = default_optimizer(model)
    train(model, optimizer, share(rank, world_size), stop=3)
    before = snapshot(model, optimizer)
    saved = optimizer.state_dict()
    outcomes = {}
    for name, of in (("shard", local_tensor), ("whole", whole)):
        broken = {
            "param_groups": saved["param_groups"],
            "state": {
                i: {k: of(v) if k in STATES else v for k, v in state.items()}
                for i, state in saved["state"].items()
            },
        }
        try:
            optimizer.load_state_dict(broken)
            outcomes[name] = "accepted"
        except ValueError as error:
            outcomes[name] = str(error)
    return {"outcomes": outcomes, "before": before, "after": snapshot(model, optimizer)}


JOBS = {
    2: [sharded, rounded, one_bad_shard, statistics, swapped, refused_states],
    4: [sharded, rounded, one_bad_shard, statistics],
}
WORLDS = pytest.mark.parametrize("world_size", [2, 4], ids=["fsdp2", "hsdp"])


@WORLDS
def test_equals_one_process(results, world_size):
    ranks = results(world_size, sharded)
    for rank in ranks:
        for path, options in PATHS.items():
            assert_same(rank[path], run_alone(**options), 1e-6)
        assert_same(rank["float64"], run_alone(torch.float64), 1e-12)
        assert set(rank["layouts"]) == {rank["parameter_layout"]}
    assert any(0 in rank["sizes"] for rank in ranks), "no empty shard: the test lost its point"
    assert ranks[0]["sizes"] != ranks[1]["sizes"], "no uneven shard: the test lost its point"


@WORLDS
def test_bfloat16_rounds_to_the_same_bits_as_one_process(results, world_size):
    for rank in results(world_size, rounded):
        for path, options in ROUNDED.items():
            model = make_model(torch.bfloat16)
            optimizer = default_optimizer(model, **options)
            train_on_given_gradients(model, optimizer)
            assert_same(rank[path], snapshot(model, optimizer), 0.0)


def test_replicas_hold_the_same_bits(results):
    by_shard = {}
    for rank in results(4, rounded):
        by_shard.setdefault(rank["shard_index"], []).append(rank["shards"])
    assert sorted(by_shard) == [0, 1]
    for first, second in by_shard.values():
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@WORLDS
@pytest.mark.parametrize("path", PATHS)
def test_a_bad_gradient_on_one_rank_skips_the_step_on_all(results, world_size, path):
    ranks = [rank[path] for rank in results(world_size, one_bad_shard)]
    for rank in ranks:
        assert rank["skipped"] == 1
        assert rank["step"] == [STEPS - 1.0] * 6
        assert_same(rank, ranks[0], 0.0)
        assert all(bool(w.isfinite().all()) for w in rank["weights"].values())


@WORLDS
def test_gate_sums_add_up_and_cost_one_collective(results, world_size):
    model = make_model()
    optimizer = default_optimizer(model, collect_stats_every=1)
    train(model, optimizer)
    (model(torch.ones(3, 5)) ** 2).mean().backward()
    optimizer.step()
    alone = optimizer.gate_sums()
    replicas = world_size // 2
    for rank in results(world_size, statistics):
        torch.testing.assert_close(
            rank["sums"][:, :-1], replicas * alone[:, :-1], rtol=1e-4, atol=1e-6
        )
        assert rank["stats"] == pytest.approx(
            {k: float(v) for k, v in optimizer.gate_stats().items()}, rel=1e-4, abs=1e-6
        )
        assert rank["collectives"] == [1, 1]


def test_parameters_swapped_after_construction(results):
    expected = run_alone()
    for rank in results(2, swapped):
        assert rank["before"] == 0
        assert rank["owned"]
        assert rank["count"] == 6
        assert_same(rank, expected, 1e-6)


@pytest.mark.parametrize("kind", ["shard", "whole"])
def test_plain_states_under_sharded_parameters_are_refused(results, kind):
    for rank in results(2, refused_states):
        assert "exp_avg" in rank["outcomes"][kind]
        assert_same(rank["after"], rank["before"], 0.0)

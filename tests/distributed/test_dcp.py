"""Distributed checkpoints: saved by 4 ranks, loaded by 1, 2 and 3; AdamW's into ours and back."""

import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from poprisk_integrations import PopRiskAdamW
from tests.helpers.sharding_problem import (
    OPTIONS,
    STEPS,
    assert_same,
    default_optimizer,
    make_model,
    shard_with_fsdp2,
    share,
    snapshot,
    train,
    two_groups,
    whole,
)

pytestmark = pytest.mark.distributed

MIDDLE = 8
HIDDEN = 2100  # a weight of 2 x 2100: large enough for 8-bit states, and empty on half of the ranks
STATE_DTYPES = (None, "bfloat16", "8bit")
READERS = (1, 2, 3)
COMPLETE = ("init_state", "dummy_step")


def ours(model, **options):
    return default_optimizer(model, **options)


def adamw(model):
    return torch.optim.AdamW(two_groups(model), **OPTIONS)


def state_tensors(model, optimizer):
    """Every state of every parameter, unsharded, as it is stored."""
    return {
        f"{name}.{key}": whole(value)
        for name, param in model.named_parameters()
        for key, value in optimizer.state[param].items()
    }


def save(folder, model, optimizer, **where):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        content = {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer),
        }
        dcp.save(content, checkpoint_id=folder, **where)


def load(folder, model, optimizer, planner=None, **where):
    """The documented recipe: present state dicts as a template, filled in place, set again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        content = {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer),
        }
        dcp.load(content, checkpoint_id=folder, planner=planner, **where)
        set_model_state_dict(model, content["model"])
        set_optimizer_state_dict(model, optimizer, content["optimizer"])


def mesh_of_first(count):
    """A mesh and a process group of the first ranks; every rank must ask."""
    from torch.distributed.device_mesh import DeviceMesh

    mesh = DeviceMesh("cpu", list(range(count)))
    return mesh, torch.distributed.new_group(list(range(count)))


def restarted(folder, mesh, group, rows, state_dtype, template):
    """A new process: untrained model, new optimizer, load, look, go on."""
    model = make_model(hidden=HIDDEN)
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    where = {"no_dist": True} if mesh is None else {"process_group": group}
    if mesh is not None:
        shard_with_fsdp2(model, mesh)
    optimizer = ours(model, state_dtype=state_dtype)
    before = None
    if template == "init_state":
        optimizer.init_state()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            get_optimizer_state_dict(model, optimizer)
        before = [float(s["step"]) for s in optimizer.state.values()]
    load(folder, model, optimizer, **where)
    loaded = state_tensors(model, optimizer)
    train(model, optimizer, rows, start=MIDDLE)
    return {
        "steps_of_template": before,
        "loaded": loaded,
        "final": state_tensors(model, optimizer),
        "weights": {n: whole(p) for n, p in model.named_parameters()},
    }


def refusal(state_dtype):
    """Why the constructor refuses a state dtype, or None."""
    try:
        PopRiskAdamW([nn.Parameter(torch.ones(2))], state_dtype=state_dtype)
    except ValueError as error:
        return str(error)
    return None


def reshard(rank, world_size, folder):
    """Saved by 4 ranks and, for comparison, trained to the end; loaded by the first 1, 2, 3."""
    meshes = {count: mesh_of_first(count) for count in (2, 3)}
    mesh, group = mesh_of_first(world_size)
    runs = {}
    for state_dtype in STATE_DTYPES:
        if refusal(state_dtype):
            continue
        path = f"{folder}/reshard_{state_dtype}"
        model = shard_with_fsdp2(make_model(hidden=HIDDEN), mesh)
        optimizer = ours(model, state_dtype=state_dtype)
        train(model, optimizer, share(rank, world_size), stop=MIDDLE)
        save(path, model, optimizer, process_group=group)
        saved = state_tensors(model, optimizer)
        train(model, optimizer, share(rank, world_size), start=MIDDLE)
        run = {
            "saved": saved,
            "final": state_tensors(model, optimizer),
            "weights": {n: whole(p) for n, p in model.named_parameters()},
        }
        torch.distributed.barrier()
        for readers in READERS:
            for template in COMPLETE:
                if rank < readers:
                    where = (None, None) if readers == 1 else meshes[readers]
                    result = restarted(path, *where, share(rank, readers), state_dtype, template)
                    run[f"{readers} {template}"] = result
                torch.distributed.barrier()
        runs[str(state_dtype)] = run if rank == 0 else {}
    return runs


def from_adamw(rank, world_size, folder):
    """AdamW trains, ours goes on: in memory, and from a checkpoint without our states."""
    mesh, _ = mesh_of_first(world_size)
    path, rows, runs = f"{folder}/adamw", share(rank, world_size), {}
    first = shard_with_fsdp2(make_model(), mesh)
    optimizer = adamw(first)
    train(first, optimizer, rows, stop=MIDDLE)
    save(path, first, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weights = get_model_state_dict(first)
        states = get_optimizer_state_dict(first, optimizer)

    for way in ("memory", "partial init_state", "partial dummy_step"):
        model = shard_with_fsdp2(make_model(), mesh)
        second = ours(model)
        if way == "partial init_state":
            second.init_state()
        if way == "memory":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                set_model_state_dict(model, weights)
                set_optimizer_state_dict(model, second, states)
        else:
            load(path, model, second, DefaultLoadPlanner(allow_partial_load=True))
        options = [
            {k: v for k, v in g.items() if k in ("alpha", "rho", "gate", "lr", "weight_decay")}
            for g in second.param_groups
        ]
        train(model, second, rows, start=MIDDLE)
        runs[way] = {"options": options, **snapshot(model, second)}
    return runs


def to_adamw(rank, world_size, folder):
    """Ours trains, AdamW goes on from the same moments."""
    mesh, _ = mesh_of_first(world_size)
    rows = share(rank, world_size)
    first = shard_with_fsdp2(make_model(), mesh)
    optimizer = ours(first)
    train(first, optimizer, rows, stop=MIDDLE)
    model = shard_with_fsdp2(make_model(), mesh)
    second = adamw(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        set_model_state_dict(model, get_model_state_dict(first))
        set_optimizer_state_dict(model, second, get_optimizer_state_dict(first, optimizer))
    train(model, second, rows, start=MIDDLE)
    return {n: whole(p) for n, p in model.named_parameters()}


def dummy_step_only(rank, world_size, folder):
    """A state dict asked for before the first step: torch takes a step with zero gradients."""
    mesh, _ = mesh_of_first(world_size)
    runs = {}
    for name, make in (
        ("ours", ours),
        ("gate none", lambda m: ours(m, gate="none")),
        ("adamw", adamw),
    ):
        model = shard_with_fsdp2(make_model(), mesh)
        start = [whole(p) for p in model.parameters()]
        optimizer = make(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            get_optimizer_state_dict(model, optimizer)
        moved = [
            not torch.equal(a, whole(b)) for a, b in zip(start, model.parameters(), strict=True)
        ]
        counts = {
            key: [float(s[key]) for s in optimizer.state.values() if key in s]
            for key in ("step", "dev_step")
        }
        train(model, optimizer, share(rank, world_size))
        weights = {n: whole(p) for n, p in model.named_parameters()}
        dev_steps = [float(s["dev_step"]) for s in optimizer.state.values() if "dev_step" in s]
        runs[name] = {"moved": any(moved), **counts, "weights": weights, "after": dev_steps}
    return runs


JOBS = {2: [from_adamw, to_adamw, dummy_step_only], 4: [reshard]}


@pytest.mark.parametrize("template", COMPLETE)
@pytest.mark.parametrize("readers", READERS)
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_saved_by_four_ranks_and_continued_by_others(results, state_dtype, readers, template):
    if reason := refusal(state_dtype):
        pytest.skip(reason)
    run = results(4, reshard)[0][str(state_dtype)]
    resumed = run[f"{readers} {template}"]
    if template == "init_state":
        assert set(resumed["steps_of_template"]) == {0.0}
    if state_dtype is not None:  # the case is not empty
        stored = {"bfloat16": torch.bfloat16, "8bit": torch.uint8}[state_dtype]
        assert any(value.dtype == stored for value in run["saved"].values())
    assert resumed["loaded"].keys() == run["saved"].keys()
    for key, value in run["saved"].items():
        assert resumed["loaded"][key].dtype == value.dtype, key
        assert torch.equal(resumed["loaded"][key], value), key
    # Gradients of other world sizes differ in the last bit, which may flip a rounded state.
    rtol = 1e-6 if state_dtype is None else 2e-3
    for name, value in run["weights"].items():
        torch.testing.assert_close(resumed["weights"][name], value, rtol=rtol, atol=rtol)
    if state_dtype is None:
        for key, value in run["final"].items():
            bound = 1e-5 * max(float(value.abs().max()), 1e-12)
            assert float((resumed["final"][key] - value).abs().max()) <= bound, key


def continued_alone(first, second):
    """One process: `first` trains to the middle, `second` loads its state and goes on."""
    model = make_model()
    optimizer = first(model)
    train(model, optimizer, stop=MIDDLE)
    other = second(model)
    other.load_state_dict(optimizer.state_dict())
    train(model, other, start=MIDDLE)
    return model, other


@pytest.mark.parametrize("way", ["memory", "partial init_state", "partial dummy_step"])
def test_adamw_checkpoint_starts_the_noise_with_its_own_count(results, way):
    expected = snapshot(*continued_alone(adamw, ours))
    assert expected["dev_step"] == [STEPS - MIDDLE] * 6
    for rank in results(2, from_adamw):
        assert_same(rank[way], expected, 1e-6)
        for group, decay in zip(rank[way]["options"], (0.1, 0.0), strict=True):
            assert group == {
                "alpha": "calibrated",
                "rho": 0.99,
                "gate": "soft",
                "lr": 1e-2,
                "weight_decay": decay,
            }


def test_adamw_continues_from_our_checkpoint(results):
    model, _ = continued_alone(ours, adamw)
    for rank in results(2, to_adamw):
        for name, param in model.named_parameters():
            torch.testing.assert_close(rank[name], param.detach(), rtol=1e-6, atol=1e-7)


def test_torchs_dummy_step_moves_nothing_and_starts_no_noise(results):
    for rank in results(2, dummy_step_only):
        assert not rank["ours"]["moved"]
        assert set(rank["ours"]["step"]) == {1.0}  # as AdamW's: torch's doing
        assert set(rank["ours"]["dev_step"]) == {0.0}
        # The zero gradient of the dummy step has no mean to deviate from; the first real
        # gradient has one (0), as after any step.
        assert set(rank["ours"]["after"]) == {float(STEPS)}
        for name, value in rank["adamw"]["weights"].items():
            assert torch.equal(rank["gate none"]["weights"][name], value)

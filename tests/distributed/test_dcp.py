"""Distributed checkpoints: saved by 4 ranks, loaded by 1, 2 and 3; AdamW's into ours and back."""

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
    gated_optimizer,
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
TEMPLATES = ("init_state", "dummy_step")
# state_dtype, number of reading ranks, how the template of the states comes about
CASES = [(None, readers, template) for readers in (1, 2, 3) for template in TEMPLATES]
for dtype in ("bfloat16", "8bit"):
    CASES += [(dtype, 1, "init_state"), (dtype, 3, "dummy_step")]


def adamw(model):
    return torch.optim.AdamW(two_groups(model), **OPTIONS)


def weights(model):
    return {name: whole(param) for name, param in model.named_parameters()}


def state_tensors(model, optimizer):
    """Every state of every parameter, unsharded, as it is stored."""
    return {
        f"{name}.{key}": whole(value)
        for name, param in model.named_parameters()
        for key, value in optimizer.state[param].items()
    }


def content_of(model, optimizer):
    states = get_optimizer_state_dict(model, optimizer)
    return {"model": get_model_state_dict(model), "optimizer": states}


def set_content(model, optimizer, content):
    set_model_state_dict(model, content["model"])
    set_optimizer_state_dict(model, optimizer, content["optimizer"])


def load(folder, model, optimizer, planner=None, **where):
    """The documented recipe: present state dicts as a template, filled in place, set again."""
    content = content_of(model, optimizer)
    dcp.load(content, checkpoint_id=folder, planner=planner, **where)
    set_content(model, optimizer, content)


def mesh_of_first(count):
    """A mesh and a process group of the first ranks; every rank must ask."""
    from torch.distributed.device_mesh import DeviceMesh

    mesh = DeviceMesh("cpu", list(range(count)))
    return mesh, torch.distributed.new_group(list(range(count)))


def restarted(path, mesh, group, rows, state_dtype, template):
    """A new process: untrained model, new optimizer, load, look, go on."""
    model = make_model(hidden=HIDDEN)
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    where = {"no_dist": True} if mesh is None else {"process_group": group}
    if mesh is not None:
        shard_with_fsdp2(model, mesh)
    optimizer = gated_optimizer(model, state_dtype=state_dtype)
    if template == "init_state":
        optimizer.init_state()
        get_optimizer_state_dict(model, optimizer)
    before = {float(s["step"]) for s in optimizer.state.values()}
    load(path, model, optimizer, **where)
    loaded = state_tensors(model, optimizer)
    train(model, optimizer, rows, start=MIDDLE)
    return {
        "steps_of_template": before,
        "loaded": loaded,
        "final": state_tensors(model, optimizer),
        "weights": weights(model),
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
    meshes = {1: (None, None), **{count: mesh_of_first(count) for count in (2, 3)}}
    mesh, group = mesh_of_first(world_size)
    runs = {}
    for state_dtype in dict.fromkeys(case[0] for case in CASES):
        if refusal(state_dtype):
            continue
        path = f"{folder}/reshard_{state_dtype}"
        model = shard_with_fsdp2(make_model(hidden=HIDDEN), mesh)
        optimizer = gated_optimizer(model, state_dtype=state_dtype)
        train(model, optimizer, share(rank, world_size), stop=MIDDLE)
        dcp.save(content_of(model, optimizer), checkpoint_id=path, process_group=group)
        saved = state_tensors(model, optimizer)
        train(model, optimizer, share(rank, world_size), start=MIDDLE)
        final = state_tensors(model, optimizer)
        runs[state_dtype] = {"saved": saved, "final": final, "weights": weights(model)}
        torch.distributed.barrier()
        for case in (case for case in CASES if case[0] == state_dtype):
            _, readers, template = case
            if rank < readers:
                rows = share(rank, readers)
                runs[case] = restarted(path, *meshes[readers], rows, state_dtype, template)
            torch.distributed.barrier()
    return runs if rank == 0 else None


def from_adamw(rank, world_size, folder):
    """AdamW trains, ours goes on: in memory, and from a checkpoint without our states."""
    mesh, _ = mesh_of_first(world_size)
    path, rows, runs = f"{folder}/adamw", share(rank, world_size), {}
    first = shard_with_fsdp2(make_model(), mesh)
    optimizer = adamw(first)
    train(first, optimizer, rows, stop=MIDDLE)
    content = content_of(first, optimizer)
    dcp.save(content, checkpoint_id=path)
    for way in WAYS:
        model = shard_with_fsdp2(make_model(), mesh)
        second = gated_optimizer(model)
        if way == "partial init_state":
            second.init_state()
        if way == "memory":
            set_content(model, second, content)
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
    first, model = (shard_with_fsdp2(make_model(), mesh) for _ in range(2))
    optimizer, second = gated_optimizer(first), adamw(model)
    train(first, optimizer, rows, stop=MIDDLE)
    set_content(model, second, content_of(first, optimizer))
    train(model, second, rows, start=MIDDLE)
    return weights(model)


def dummy_step_only(rank, world_size, folder):
    """A state dict asked for before the first step: torch takes a step with zero gradients."""
    mesh, _ = mesh_of_first(world_size)
    runs = {}
    for name, make, options in (
        ("ours", gated_optimizer, {}),
        ("gate none", gated_optimizer, {"gate": "none"}),
        ("adamw", adamw, {}),
    ):
        model = shard_with_fsdp2(make_model(), mesh)
        start, optimizer = weights(model), make(model, **options)
        get_optimizer_state_dict(model, optimizer)
        states = [{k: float(s[k]) for k in COUNTS if k in s} for s in optimizer.state.values()]
        moved = [name for name, value in weights(model).items() if not value.equal(start[name])]
        train(model, optimizer, share(rank, world_size))
        after = [float(s["dev_step"]) for s in optimizer.state.values() if "dev_step" in s]
        runs[name] = {"moved": moved, "states": states, "weights": weights(model), "after": after}
    return runs


WAYS = ("memory", "partial init_state", "partial dummy_step")
COUNTS = ("step", "dev_step")
JOBS = {2: [from_adamw, to_adamw, dummy_step_only], 4: [reshard]}


@pytest.mark.parametrize(("state_dtype", "readers", "template"), CASES)
def test_saved_by_four_ranks_and_continued_by_others(results, state_dtype, readers, template):
    if reason := refusal(state_dtype):
        pytest.skip(reason)
    runs = results(4, reshard)[0]
    run, resumed = runs[state_dtype], runs[state_dtype, readers, template]
    if template == "init_state":
        assert resumed["steps_of_template"] == {0.0}
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


@pytest.mark.parametrize("way", WAYS)
def test_adamw_checkpoint_starts_the_noise_with_its_own_count(results, way):
    expected = snapshot(*continued_alone(adamw, gated_optimizer))
    assert expected["dev_step"] == [STEPS - MIDDLE] * 6
    for rank in results(2, from_adamw):
        assert_same(rank[way], expected, 1e-6)
        for group, decay in zip(rank[way]["options"], (0.1, 0.0), strict=True):
            kept = {"lr": 1e-2, "weight_decay": decay}
            assert group == {"alpha": "calibrated", "rho": 0.99, "gate": "soft", **kept}


def test_adamw_continues_from_our_checkpoint(results):
    model, _ = continued_alone(gated_optimizer, adamw)
    for rank in results(2, to_adamw):
        for name, param in model.named_parameters():
            torch.testing.assert_close(rank[name], param.detach(), rtol=1e-6, atol=1e-7)


def test_torchs_dummy_step_moves_nothing_and_starts_no_noise(results):
    for rank in results(2, dummy_step_only):
        assert rank["ours"]["moved"] == []
        # The step is AdamW's: torch's doing.
        assert rank["ours"]["states"] == [{"step": 1.0, "dev_step": 0.0}] * 6
        # The zero gradient of the dummy step has no mean to deviate from; the first real
        # gradient has one (0), as after any step.
        assert set(rank["ours"]["after"]) == {float(STEPS)}
        for name, value in rank["adamw"]["weights"].items():
            assert torch.equal(rank["gate none"]["weights"][name], value)

"""States out and in again, as torch's own optimizers are held to it."""

import copy
import inspect
import io

import pytest
import torch

from poprisk_integrations import PopRiskAdamW
from tests.helpers.optim_problem import feed, gradients, make_params, max_ulp, train
from tests.unit.optim.torch_generic.optimizer_info import (
    EAGER,
    EVERY,
    IMPLEMENTATIONS,
    INFO,
    flags,
    inputs,
    needs_cuda,
    snapshot,
    unchanged,
)


def advance(optimizer, history):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for row in history:
        feed(params, row)
        optimizer.step()
    return params


@pytest.mark.parametrize("kwargs", inputs())
@pytest.mark.parametrize("impl", EAGER)
def test_saved_and_loaded_without_pickles_it_continues_bitwise(impl, kwargs):
    """And twice the same state gives twice the same steps."""
    history = gradients(12)
    options = flags(impl, **kwargs)
    params, source = train(lambda p: PopRiskAdamW(p, **options), history=history[:6])
    before = snapshot(source)
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    runs = []
    for _ in range(2):
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=True)
        clones = [torch.nn.Parameter(p.detach().clone()) for p in params]
        # What the checkpoint does not set: how the step is computed and what is collected.
        every = kwargs.get("collect_stats_every", 0)
        optimizer = PopRiskAdamW(clones, collect_stats_every=every, **flags(impl))
        optimizer.load_state_dict(saved)
        assert unchanged(optimizer, before)
        runs.append(advance(optimizer, history[6:]))
    expected = advance(source, history[6:])
    assert max_ulp(runs[0], expected) == 0.0
    assert max_ulp(runs[1], expected) == 0.0


@pytest.mark.parametrize("kwargs", inputs())
@pytest.mark.parametrize("impl", EAGER)
def test_states_are_tensors_and_options_plain_values(impl, kwargs):
    """Pitfall 8: distributed checkpoints drop or mangle None and text inside states."""
    _, optimizer = train(lambda p: PopRiskAdamW(p, **flags(impl, **kwargs)), steps=2)
    saved = optimizer.state_dict()
    assert set(saved["state"]) == {0, 1, 2, 3, 4}
    for state in saved["state"].values():
        assert state  # a parameter that was stepped has a state
        assert all(isinstance(value, torch.Tensor) for value in state.values())
    plain = (bool, int, float, str, type(None), torch.Tensor, tuple, list, dict)
    for group in saved["param_groups"]:
        assert {type(value) for value in group.values()} <= set(plain)


def test_an_older_state_without_newer_options_takes_those_of_the_constructor():
    """As if the saved state came from a release that had nothing but AdamW's arguments."""
    _, source = train(lambda p: PopRiskAdamW(p, lr=1e-2, gate="hard"), steps=3)
    saved = source.state_dict()
    known = set(inspect.signature(torch.optim.AdamW).parameters)
    for group in saved["param_groups"]:
        for name in set(group) - known:
            del group[name]
    clones = make_params()
    optimizer = PopRiskAdamW(clones, gate="snr", rho=0.9)
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    assert (group["gate"], group["rho"], group["lr"]) == ("snr", 0.9, 1e-2)
    assert set(group) == set(PopRiskAdamW(make_params()).param_groups[0])
    advance(optimizer, gradients(2))


@pytest.mark.parametrize("names", ["saved", "loaded", "both", "neither"])
def test_names_of_parameters_need_not_be_on_both_sides(names):
    def build(named):
        params = make_params()
        given = [(f"layer.{i}", p) for i, p in enumerate(params)] if named else params
        return PopRiskAdamW(given, lr=1e-2)

    source = build(names in ("saved", "both"))
    history = gradients(8)
    advance(source, history[:4])
    target = build(names in ("loaded", "both"))
    for a, b in zip(
        target.param_groups[0]["params"], source.param_groups[0]["params"], strict=True
    ):
        a.data.copy_(b.data)
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    assert ("param_names" in target.param_groups[0]) == (names != "neither")
    assert max_ulp(advance(target, history[4:]), advance(source, history[4:])) == 0.0


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize(
    "count", [3, 3.0, torch.tensor(3), torch.tensor([3.0]), torch.tensor(3.0).double()], ids=repr
)
def test_counts_may_be_numbers_or_of_another_shape(impl, count):
    """Pitfall 18: what is kept is 0-dim float32, so that padding and sharding leave it alone."""
    _, source = train(lambda p: PopRiskAdamW(p, lr=1e-2, **flags(impl)), steps=3)
    saved = copy.deepcopy(source.state_dict())
    for index, state in saved["state"].items():
        if state["step"].item() == 3:
            saved["state"][index]["step"] = count
    clones = make_params()
    optimizer = PopRiskAdamW(clones, **flags(impl))
    optimizer.load_state_dict(saved)
    step = optimizer.state[clones[0]]["step"]
    assert (step.shape, step.dtype, step.item()) == ((), torch.float32, 3.0)
    advance(optimizer, gradients(1))
    assert step.item() == 4


@pytest.mark.parametrize("key", ["step", "dev_step", "exp_avg", "exp_avg_sq", "exp_dev_sq"])
@pytest.mark.parametrize("impl", EVERY)
def test_each_state_is_created_where_it_alone_is_missing(impl, key):
    """Pitfall 3: tools that filter states leave some keys and drop others."""
    params, optimizer = train(lambda p: PopRiskAdamW(p, **flags(impl)), steps=3)
    for param in params:
        del optimizer.state[param][key]
    advance(optimizer, gradients(3))
    for param in params:
        assert sorted(optimizer.state[param]) == [
            "dev_step",
            "exp_avg",
            "exp_avg_sq",
            "exp_dev_sq",
            "step",
        ]
        assert torch.isfinite(param).all()


@pytest.mark.parametrize("kwargs", inputs())
def test_a_deep_copy_has_all_public_attributes(kwargs):
    """Pitfall 9: what is not in groups, state or defaults is lost by copies."""
    _, optimizer = train(lambda p: PopRiskAdamW(p, **flags("single_tensor", **kwargs)), steps=3)
    twin = copy.deepcopy(optimizer)

    def public(opt):
        return {name for name in vars(opt) if not name.startswith("_")}

    assert public(twin) == public(optimizer)
    assert twin.path == optimizer.path
    # torch itself adds a name of its own to the defaults of a copy
    assert {name: twin.defaults[name] for name in optimizer.defaults} == optimizer.defaults
    assert unchanged(twin, snapshot(optimizer))
    history = gradients(4)
    assert max_ulp(advance(twin, history), advance(optimizer, history)) == 0.0


@pytest.mark.parametrize("kwargs", inputs())
def test_non_empty_state(kwargs):
    """Every parameter that had a gradient has every key, whatever the options (resharding and
    `torch.distributed.checkpoint` rely on equal keys everywhere)."""
    params, optimizer = train(
        lambda p: PopRiskAdamW(p, **flags("single_tensor", **kwargs)), steps=2
    )
    keys = {tuple(sorted(optimizer.state[p])) for p in params}
    assert len(keys) == 1
    fresh = PopRiskAdamW(make_params(), **flags("single_tensor", **kwargs))
    fresh.init_state()
    assert {tuple(sorted(s)) for s in fresh.state.values()} == keys


def test_load_by_keyword():
    """Pitfall 2: `set_optimizer_state_dict` passes `state_dict=`."""
    _, source = train(lambda p: PopRiskAdamW(p, lr=1e-2), steps=2)
    optimizer = PopRiskAdamW(make_params())
    optimizer.load_state_dict(state_dict=source.state_dict())
    assert optimizer.param_groups[0]["lr"] == 1e-2
    assert list(inspect.signature(PopRiskAdamW.load_state_dict).parameters) == [
        "self",
        "state_dict",
    ]


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("source_cls", [PopRiskAdamW, torch.optim.AdamW])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_through_the_distributed_checkpoint_helpers(source_cls, dtype, flat):
    """Pitfalls 1, 2, 3 and 8 in one: names for indices, by keyword, from both."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model = torch.nn.Linear(3, 2, dtype=dtype)
    source = source_cls(model.parameters(), lr=1e-2)
    x = torch.randn(5, 3).to(dtype)
    for _ in range(3):
        source.zero_grad()
        model(x).square().sum().backward()
        source.step()
    saved = get_optimizer_state_dict(model, source, options=options)
    clone = copy.deepcopy(model)
    optimizer = PopRiskAdamW(clone.parameters(), gate="hard")
    if flat and source_cls is not PopRiskAdamW:
        # A flat dictionary must name every option and state: what AdamW has not is our own.
        saved = {**get_optimizer_state_dict(clone, optimizer, options=options), **saved}
    set_optimizer_state_dict(clone, optimizer, saved, options=options)
    for a, b in zip(clone.parameters(), model.parameters(), strict=True):
        state = optimizer.state[a]
        assert state["step"].item() == 3
        assert state["exp_avg"].dtype == torch.float32
        torch.testing.assert_close(state["exp_avg"], source.state[b]["exp_avg"].float())
    optimizer.zero_grad()
    clone(x).square().sum().backward()
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in clone.parameters())


def test_the_helpers_dummy_step_is_inert_and_counts_one():
    """Pitfall 4: without `init_state()` the checkpoint helpers materialise states by a step with
    zero gradients and lr=0. Parameters and moments must not notice; the count cannot help it."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = torch.nn.Linear(3, 2)
    start = copy.deepcopy(model.state_dict())
    optimizer = PopRiskAdamW(model.parameters(), lr=0.5, weight_decay=0.5)
    get_optimizer_state_dict(model, optimizer)
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())
    assert optimizer.param_groups[0]["lr"] == 0.5
    for state in optimizer.state.values():
        assert not any(state[key].any() for key in ("exp_avg", "exp_avg_sq", "exp_dev_sq"))
        assert (state["step"].item(), state["dev_step"].item()) == (1, 0)


@pytest.mark.parametrize("impl", EAGER)
def test_flags_of_the_process_win_over_those_of_the_checkpoint(impl):
    """A state saved on an accelerator with its flags continues on a CPU without them."""
    history = gradients(10)
    params, source = train(
        lambda p: PopRiskAdamW(p, lr=1e-2, **IMPLEMENTATIONS["capturable"]), history=history[:5]
    )
    clones = [torch.nn.Parameter(p.detach().clone()) for p in params]
    optimizer = PopRiskAdamW(clones, **IMPLEMENTATIONS[impl])
    optimizer.load_state_dict(copy.deepcopy(source.state_dict()))
    assert optimizer.path == impl
    for a, e in zip(advance(optimizer, history[5:]), advance(source, history[5:]), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["capturable", "fused"])
def test_a_state_saved_on_cpu_continues_on_cuda(impl):
    history = gradients(10)
    params, source = train(lambda p: INFO.optim_cls(p, lr=1e-2), history=history[:5])
    clones = [torch.nn.Parameter(p.detach().cuda()) for p in params]
    optimizer = INFO.optim_cls(clones, **flags(impl, "cuda"))
    saved = copy.deepcopy(source.state_dict())
    optimizer.load_state_dict(saved)
    for param in clones:
        assert {value.device.type for value in optimizer.state[param].values()} == {"cuda"}
    moved = advance(optimizer, [[None if g is None else g.cuda() for g in r] for r in history[5:]])
    expected = advance(source, history[5:])
    for a, e in zip(moved, expected, strict=True):
        torch.testing.assert_close(a.cpu(), e, rtol=1e-5, atol=1e-6)
    assert saved["state"][0]["step"].item() == 5  # the caller's dictionary was not trained on

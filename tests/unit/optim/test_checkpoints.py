"""States out and in again: ours, AdamW's, those of other formats and places, and refusals."""

import copy
import inspect
import io
import pickle

import pytest
import torch

from poprisk_integrations import PopRiskAdamW
from tests.helpers.optim_problem import (
    feed,
    gradients,
    make_params,
    max_ulp,
    snapshot,
    temporal,
    train,
    unchanged,
)
from tests.unit.optim.paths import EAGER, EVERY, FLAGS, TORCH, needs_cuda

RAW = {"noise_mean": "raw", "gate_eps": 0.0}  # the published rule's deviations
KEYS = ["dev_step", "exp_avg", "exp_avg_sq", "exp_dev_sq", "step"]


def through_disk(state_dict):
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def copies(params):
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def resume(params, source, cls=temporal, **kwargs):
    fresh = copies(params)
    optimizer = cls(fresh, **kwargs)
    optimizer.load_state_dict(through_disk(source.state_dict()))
    return fresh, optimizer


def advance(params, optimizer, history):
    for row in history:
        feed(params, row)
        optimizer.step()
    return params


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kwargs", [{}, {"gate_warmup": 8}, RAW], ids=str)
@pytest.mark.parametrize("impl", TORCH)
def test_resumed_equals_uninterrupted_bitwise(impl, kwargs, dtype):
    options = {**FLAGS[impl], **kwargs}
    history = gradients(10, dtype)
    params, source = train(lambda p: temporal(p, **options), history=history[:6], dtype=dtype)
    before, saved = snapshot(source), through_disk(source.state_dict())
    for _ in range(2):
        fresh = copies(params)
        optimizer = temporal(fresh, lr=123.0, **FLAGS[impl])
        optimizer.load_state_dict(saved)
        assert unchanged(optimizer, before)
        advance(fresh, optimizer, history[6:])  # on copies: the dictionary serves twice
    advance(params, source, history[6:])
    assert unchanged(optimizer, snapshot(source))


def test_states_of_bfloat16_parameters_stay_float32_and_counts_stay_exact():
    params = [torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))]
    optimizer = temporal(params, lr=1e-3)
    for _ in range(301):  # 301 is 300 in bfloat16
        params[0].grad = torch.randn(3).bfloat16()
        optimizer.step()
    fresh, loaded = resume(params, optimizer)
    state = loaded.state[fresh[0]]
    assert (state["step"].item(), state["dev_step"].item()) == (301, 300)
    for key in ("exp_avg", "exp_avg_sq", "exp_dev_sq"):
        assert torch.equal(state[key], optimizer.state[params[0]][key])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kwargs", [{}, {"gate": "none"}, RAW], ids=str)
def test_state_keys_and_dtypes(kwargs, dtype):
    """The same keys for every parameter, tensors all of them, options plain values: distributed
    checkpoints drop or mangle None and text inside states."""
    _, optimizer = train(lambda p: temporal(p, **kwargs), steps=2, dtype=dtype)
    fresh = temporal(make_params(dtype))
    fresh.init_state()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for param, state in (*optimizer.state.items(), *fresh.state.items()):
        assert sorted(state) == KEYS
        for key, value in state.items():
            assert isinstance(value, torch.Tensor)
            expected = (torch.float32, ()) if "step" in key else (wide, param.shape)
            assert (value.dtype, value.shape) == expected
    plain = (bool, int, float, str, type(None), torch.Tensor, tuple, list, dict)
    for group in optimizer.state_dict()["param_groups"]:
        assert {type(value) for value in group.values()} <= set(plain)


@pytest.mark.parametrize("source", [torch.optim.AdamW, torch.optim.Adam])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("impl", TORCH)
def test_adamw_checkpoint_in(impl, source, fused):
    params, optimizer = train(lambda p: source(p, lr=3e-2, fused=fused), steps=6)
    fresh, ours = resume(params, optimizer, gate="hard", rho=0.9, **FLAGS[impl])
    group = ours.param_groups[0]
    assert (group["gate"], group["rho"], group["lr"]) == ("hard", 0.9, 3e-2)
    assert group["fused"] == FLAGS[impl].get("fused")
    assert group["foreach"] == FLAGS[impl].get("foreach")
    state = ours.state[fresh[0]]
    assert "exp_dev_sq" not in state
    grad = gradients(7)[6]
    mean = optimizer.state[params[0]]["exp_avg"] / (1 - 0.9**6)
    advance(fresh, ours, [grad])
    # One deviation so far, corrected by its own count: s_hat is that deviation itself.
    assert (state["step"].item(), state["dev_step"].item()) == (7, 1)
    s_hat = state["exp_dev_sq"] / (1 - 0.9)
    torch.testing.assert_close(s_hat, (grad[0] - mean).square(), rtol=1e-4, atol=1e-7)


def test_without_a_gate_both_continue_each_other_bitwise():
    history = gradients(20)
    whole, _ = train(lambda p: torch.optim.AdamW(p, lr=1e-2), history=history)
    params, optimizer = train(lambda p: torch.optim.AdamW(p, lr=1e-2), history=history[:9])
    params, ours = resume(params, optimizer, gate="none")
    assert max_ulp(advance(params, ours, history[9:]), whole) == 0.0
    params, ours = train(lambda p: temporal(p, lr=1e-2, gate="none"), history=history[:9])
    fresh, theirs = resume(params, ours, cls=torch.optim.AdamW)
    assert max_ulp(advance(fresh, theirs, history[9:]), whole) == 0.0


def test_per_group_options_survive_an_adamw_checkpoint():
    params, fresh = make_params(), make_params()
    optimizer = torch.optim.AdamW([{"params": params[:1]}, {"params": params[1:]}])
    advance(params, optimizer, gradients(2))
    ours = temporal([{"params": fresh[:1], "gate": "none"}, {"params": fresh[1:]}])
    before = set(ours.param_groups[0])
    ours.load_state_dict(optimizer.state_dict())
    assert [g["gate"] for g in ours.param_groups] == ["none", "soft"]
    ours.load_state_dict(through_disk(ours.state_dict()))
    assert set(ours.param_groups[0]) >= before


@pytest.mark.parametrize("names", ["saved", "loaded", "both"])
def test_names_of_parameters_need_not_be_on_both_sides(names):
    def build(named):
        params = make_params()
        given = [(f"layer.{i}", p) for i, p in enumerate(params)] if named else params
        return params, temporal(given, lr=1e-2)

    params, source = build(names in ("saved", "both"))
    history = gradients(8)
    advance(params, source, history[:4])
    others, target = build(names in ("loaded", "both"))
    for a, b in zip(others, params, strict=True):
        a.data.copy_(b.data)
    target.load_state_dict(state_dict=copy.deepcopy(source.state_dict()))  # DCP passes a keyword
    assert "param_names" in target.param_groups[0]
    advance(others, target, history[4:])
    assert max_ulp(others, advance(params, source, history[4:])) == 0.0


@pytest.mark.parametrize("impl", TORCH)
@pytest.mark.parametrize(
    "count", [3, 3.0, torch.tensor(3), torch.tensor([3.0]), torch.tensor(3.0).double()], ids=repr
)
def test_counts_may_be_numbers_or_of_another_shape(impl, count):
    """What is kept is 0-dim float32, so that padding and sharding leave it alone."""
    _, source = train(lambda p: temporal(p, lr=1e-2, **FLAGS[impl]), steps=3)
    saved = copy.deepcopy(source.state_dict())
    for state in saved["state"].values():
        state["step"] = count if state["step"].item() == 3 else state["step"]
    clones = make_params()
    optimizer = temporal(clones, **FLAGS[impl])
    optimizer.load_state_dict(saved)
    step = optimizer.state[clones[0]]["step"]
    assert (step.shape, step.dtype, step.item()) == ((), torch.float32, 3.0)
    advance(clones, optimizer, gradients(1))
    assert step.item() == 4


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("impl", EVERY)
def test_each_state_is_created_where_it_alone_is_missing(impl, key):
    """Tools that filter states leave some keys and drop others."""
    params, optimizer = train(lambda p: temporal(p, **FLAGS[impl]), steps=3)
    for param in params:
        del optimizer.state[param][key]
    advance(params, optimizer, gradients(3))
    for param in params:
        assert sorted(optimizer.state[param]) == KEYS
        assert torch.isfinite(param).all()


def test_init_state_makes_a_template_without_a_step():
    params = make_params()
    optimizer = temporal(params)
    optimizer.load_state_dict(optimizer.state_dict())  # wrappers do so with a fresh optimizer
    assert not optimizer.state
    optimizer.init_state()
    assert all(optimizer.state[param]["step"].item() == 0 for param in params)
    whole, _ = train(lambda p: temporal(p, lr=1e-3), steps=5)
    assert max_ulp(advance(params, optimizer, gradients(5)), whole) == 0.0


@pytest.mark.parametrize("is_made", [True, False])
def test_templates_of_distributed_checkpoints_are_inert(is_made):
    """Without `init_state()` torch's helpers materialise states by a step with zero gradients and
    lr=0. Parameters and moments must not notice; the count cannot help it."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = torch.nn.Linear(3, 2)
    start = copy.deepcopy(model.state_dict())
    optimizer = temporal(model.parameters(), lr=0.5, weight_decay=0.5)
    if is_made:
        optimizer.init_state()
    saved = get_optimizer_state_dict(model, optimizer)
    assert set(saved["state"]["weight"]) == set(KEYS)
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())
    assert optimizer.param_groups[0]["lr"] == 0.5
    for state in optimizer.state.values():
        assert not any(state[key].any() for key in ("exp_avg", "exp_avg_sq", "exp_dev_sq"))
        assert (state["step"].item(), state["dev_step"].item()) == (0 if is_made else 1, 0)


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("source_cls", [temporal, torch.optim.AdamW])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_through_the_distributed_checkpoint_helpers(source_cls, dtype, flat):
    """Names for indices, by keyword, flattened or not, from both optimizers."""
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
    optimizer = temporal(clone.parameters(), gate="hard")
    if flat and source_cls is not temporal:
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


ELSEWHERE = [("cpu", impl, FLAGS[impl]) for impl in TORCH]
ELSEWHERE += [
    pytest.param("cuda", None, options, marks=needs_cuda) for options in ({}, {"fused": False})
]


@pytest.mark.parametrize(("device", "impl", "options"), ELSEWHERE)
def test_a_state_continues_elsewhere(device, impl, options):
    """With the flags of the process, not with those of the checkpoint."""
    history = gradients(10)
    flags = FLAGS["capturable" if device == "cpu" else "single_tensor"]
    params, source = train(lambda p: temporal(p, lr=1e-2, **flags), history=history[:5])
    clones = [torch.nn.Parameter(p.detach().to(device, copy=True)) for p in params]
    optimizer = temporal(clones, **options)
    saved = copy.deepcopy(source.state_dict())
    optimizer.load_state_dict(saved)
    assert impl is None or optimizer.path == impl
    for state in optimizer.state.values():
        assert {value.device.type for value in state.values()} == {device}
    moved = [[None if g is None else g.to(device) for g in row] for row in history[5:]]
    advance(clones, optimizer, moved)
    for a, e in zip(clones, advance(params, source, history[5:]), strict=True):
        torch.testing.assert_close(a.cpu(), e, rtol=1e-5, atol=1e-6)
    assert saved["state"][0]["step"].item() == 5  # the caller's dictionary was not trained on


def without(key):
    return lambda saved: saved["state"][0].pop(key)


def with_state(key, value):
    return lambda saved: saved["state"][0].update({key: value})


def with_option(name, value):
    return lambda saved: saved["param_groups"][0].update({name: value})


def not_ours(saved):
    saved["state"][0]["momentum_buffer"] = torch.zeros(5, 7)
    del saved["state"][0]["dev_step"]


def one_group_more(saved):
    saved["param_groups"].append({**saved["param_groups"][0], "params": []})


BAD_STATES = {
    "no exp_avg": (without("exp_avg"), "Not a PopRiskAdamW or AdamW checkpoint"),
    "no step": (without("step"), "Not a PopRiskAdamW or AdamW checkpoint"),
    "another optimizer": (not_ours, "momentum_buffer"),
    "exp_avg shape": (with_state("exp_avg", torch.zeros(7, 5)), r"exp_avg .* \(7, 5\)"),
    "noise shape": (with_state("exp_dev_sq", torch.zeros(())), r"exp_dev_sq .* \(\)"),
    "noise is None": (with_state("exp_dev_sq", None), "exp_dev_sq of parameter 0"),
    "mean is text": (with_state("exp_avg", "zeros"), "exp_avg of parameter 0"),
    "complex mean": (
        with_state("exp_avg", torch.zeros(5, 7, dtype=torch.complex64)),
        "exp_avg of parameter 0",
    ),
    "step shape": (with_state("step", torch.ones(3)), "step of parameter 0"),
    "step is None": (with_state("step", None), "step of parameter 0"),
    "dev_step is text": (with_state("dev_step", "2"), "dev_step of parameter 0"),
    "amsgrad": (with_option("amsgrad", True), "Invalid amsgrad in the checkpoint: True"),
    "lr": (with_option("lr", -1.0), "Invalid learning rate: -1.0"),
    "gate": (with_option("gate", "sotf"), "Invalid gate: 'sotf'"),
    "finite without sizes": (with_option("alpha", "finite"), "alpha='finite' needs"),
    "more groups": (one_group_more, "different number of parameter groups"),
    "fewer parameters": (
        lambda saved: saved["param_groups"][0]["params"].pop(),
        "doesn't match the size of optimizer's group",
    ),
    **{
        cls.__name__: (
            lambda saved, cls=cls: saved.update(
                train(lambda p: cls(p, lr=0.1), steps=2)[1].state_dict()
            ),
            "Not a PopRiskAdamW or AdamW checkpoint",
        )
        for cls in (torch.optim.Adamax, torch.optim.RMSprop, torch.optim.Adagrad)
    },
}


@pytest.mark.parametrize(("change", "message"), BAD_STATES.values(), ids=BAD_STATES)
def test_a_state_that_does_not_fit_is_refused_and_nothing_changes(change, message):
    saved = copy.deepcopy(train(lambda p: temporal(p, lr=1e-2), steps=3)[1].state_dict())
    change(saved)
    _, optimizer = train(lambda p: temporal(p, lr=3e-3, gate="snr"), steps=5)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert unchanged(optimizer, before)
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    assert not optimizer._optimizer_load_state_dict_post_hooks


@pytest.mark.parametrize("impl", EAGER)
@pytest.mark.parametrize("copier", ["deepcopy", "pickle"])
def test_copies_continue_bitwise(copier, impl):
    """With all public attributes; what is not in groups, state or defaults is lost by copies."""
    params, optimizer = train(
        lambda p: temporal(p, lr=1e-2, gate="snr", collect_stats_every=2, **FLAGS[impl]),
        steps=5,
    )
    if copier == "deepcopy":
        twin = copy.deepcopy(optimizer)
    else:
        twin = pickle.loads(pickle.dumps(optimizer))
    assert unchanged(twin, snapshot(optimizer))
    assert twin.path == optimizer.path
    # torch itself adds a name of its own to the defaults of a copy
    assert {name: twin.defaults[name] for name in optimizer.defaults} == optimizer.defaults
    clones = twin.param_groups[0]["params"]
    history = gradients(5, seed=3)
    advance(clones, twin, history)
    assert max_ulp(advance(params, optimizer, history), clones) == 0.0
    assert twin.gate_stats()


@pytest.mark.parametrize("way", ["state", "pickle"])
def test_one_of_an_older_version_takes_the_options_that_it_lacks(way):
    """From a release that had nothing but AdamW's arguments: those of the constructor."""
    params, source = train(lambda p: temporal(p, lr=1e-2, gate="hard"), steps=3)
    known = set(inspect.signature(torch.optim.AdamW).parameters)
    saved = source.state_dict() if way == "state" else source.__getstate__()
    for group in (*saved["param_groups"], saved.get("defaults", {})):
        for name in set(group) - known:
            del group[name]
    if way == "state":
        optimizer = temporal(params, gate="snr", rho=0.9)
        optimizer.load_state_dict(saved)
    else:
        optimizer = PopRiskAdamW.__new__(PopRiskAdamW)
        optimizer.__setstate__(saved)
    group = optimizer.param_groups[0]
    expected = ("snr", 0.9) if way == "state" else ("soft", 0.99)
    assert (group["gate"], group["rho"], group["lr"]) == (*expected, 1e-2)
    assert set(group) == set(temporal(make_params()).param_groups[0])
    advance(params, optimizer, gradients(2))

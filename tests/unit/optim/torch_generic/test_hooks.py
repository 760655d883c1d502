"""Hooks around step, state_dict and load_state_dict: in order, once, as torch promises."""

import copy

import pytest
import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from poprisk_integrations import PopRiskAdamW
from tests.helpers.optim_problem import feed, gradients, make_params, max_ulp, train


def prepared(**kwargs):
    params = make_params()
    optimizer = PopRiskAdamW(params, **kwargs)
    feed(params, gradients(2)[1])
    return params, optimizer


def test_step_hooks_order_and_arguments():
    params, optimizer = prepared(lr=1e-2)
    seen = []

    def note(name):
        def hook(opt, args, kwargs):
            assert opt is optimizer
            seen.append((name, opt.state[params[0]].get("step", torch.tensor(0.0)).item()))

        return hook

    handles = [
        optimizer.register_step_post_hook(note("post")),
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_pre_hook(note("pre again")),
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    try:
        optimizer.step()
        names = [name for name, _ in seen]
        assert names == ["global pre", "pre", "pre again", "post", "global post"]
        assert [step for _, step in seen] == [0, 0, 0, 1, 1]
    finally:
        for handle in handles:
            handle.remove()
    optimizer.step()
    assert len(seen) == 5


def test_a_pre_hook_may_replace_the_closure():
    _, optimizer = prepared()
    calls = []

    def closure():
        calls.append(1)
        return 7

    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, closure), {}))
    assert optimizer.step() == 7
    assert calls == [1]


def test_a_pre_hook_may_prepare_gradients():
    """Gradient transforms that live in hooks are seen by the step."""
    params, optimizer = prepared(lr=1e-2)

    @optimizer.register_step_pre_hook
    def zero(opt, args, kwargs):
        for param in params:
            param.grad = torch.zeros_like(param)

    optimizer.step()
    assert not optimizer.state[params[0]]["exp_avg"].any()


def test_state_dict_hooks():
    _, optimizer = prepared()
    optimizer.step()
    order = []
    optimizer.register_state_dict_pre_hook(lambda opt: order.append("pre"))
    optimizer.register_state_dict_post_hook(lambda opt, saved: order.append("post"))
    optimizer.register_state_dict_pre_hook(lambda opt: order.append("first"), prepend=True)

    def extended(opt, saved):
        return {**saved, "ours": "kept"}

    optimizer.register_state_dict_post_hook(extended)
    saved = optimizer.state_dict()
    assert order == ["first", "pre", "post"]
    assert saved["ours"] == "kept"
    _, fresh = prepared()
    fresh.load_state_dict(saved)  # more keys at the top are not ours to refuse


def test_load_state_dict_pre_hook_may_replace_the_state():
    """What is checked and restored is what the last hook hands over."""
    params, source = train(lambda p: PopRiskAdamW(p, lr=1e-2), steps=3)
    wanted = source.state_dict()
    _, optimizer = prepared()
    optimizer.register_load_state_dict_pre_hook(lambda opt, given: wanted)
    optimizer.load_state_dict({"state": {0: {"square_avg": torch.zeros(1)}}, "param_groups": []})
    fresh = optimizer.param_groups[0]["params"]
    assert optimizer.param_groups[0]["lr"] == 1e-2
    for a, b in zip(fresh, params, strict=True):
        assert torch.equal(optimizer.state[a]["exp_dev_sq"], source.state[b]["exp_dev_sq"])


@pytest.mark.parametrize("prepend", [True, False])
def test_load_state_dict_hooks_in_order(prepend):
    _, source = train(lambda p: PopRiskAdamW(p, lr=1e-2), steps=3)
    params, optimizer = prepared()
    order = []
    optimizer.register_load_state_dict_pre_hook(lambda opt, given: order.append("pre"))
    optimizer.register_load_state_dict_pre_hook(
        lambda opt, given: order.append("pre2"), prepend=prepend
    )
    optimizer.register_load_state_dict_post_hook(
        lambda opt: order.append(opt.state[params[0]]["step"].item())
    )
    optimizer.register_load_state_dict_post_hook(lambda opt: order.append("post2"), prepend=prepend)
    optimizer.load_state_dict(source.state_dict())
    expected = ["pre2", "pre", "post2", 3] if prepend else ["pre", "pre2", 3, "post2"]
    assert order == expected


def test_a_raising_hook_leaves_no_hooks_of_ours_behind():
    _, source = train(lambda p: PopRiskAdamW(p, lr=1e-2), steps=3)
    _, optimizer = prepared()

    def refuse(opt, given):
        raise RuntimeError("not now")

    handle = optimizer.register_load_state_dict_pre_hook(refuse)
    with pytest.raises(RuntimeError, match="not now"):
        optimizer.load_state_dict(source.state_dict())
    handle.remove()
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    assert not optimizer._optimizer_load_state_dict_post_hooks
    optimizer.load_state_dict(source.state_dict())
    assert optimizer.param_groups[0]["lr"] == 1e-2


def test_hooks_stay_with_their_optimizer():
    """A copy has none of them, and takes the same step."""
    params, optimizer = prepared(lr=1e-2)
    calls = []
    optimizer.register_step_post_hook(lambda opt, args, kwargs: calls.append(opt))
    twin = copy.deepcopy(optimizer)
    clones = twin.param_groups[0]["params"]
    feed(clones, gradients(2)[1])
    optimizer.step()
    twin.step()
    assert calls == [optimizer]
    assert max_ulp(clones, params) == 0.0


def test_the_profiler_names_the_step():
    params, optimizer = prepared()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
        optimizer.zero_grad()
    names = {event.key for event in profile.key_averages()}
    assert "Optimizer.step#PopRiskAdamW.step" in names
    assert "Optimizer.zero_grad#PopRiskAdamW.zero_grad" in names
    assert all(p.grad is None for p in params)

"""Hooks around step and load_state_dict: in order, once, as torch promises."""

import pytest
import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from poprisk_integrations import PopRiskAdamW
from tests.helpers.optim_problem import feed, gradients, make_params, train


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


def test_a_pre_hook_may_prepare_gradients():
    """Gradient transforms that live in hooks are seen by the step."""
    params, optimizer = prepared(lr=1e-2)

    @optimizer.register_step_pre_hook
    def zero(opt, args, kwargs):
        for param in params:
            param.grad = torch.zeros_like(param)

    optimizer.step()
    assert not optimizer.state[params[0]]["exp_avg"].any()


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
        assert torch.equal(optimizer.state[a]["exp_avg_sq"], source.state[b]["exp_avg_sq"])


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
    # more keys at the top, as a hook of state_dict may put there, are not ours to refuse
    optimizer.load_state_dict({**source.state_dict(), "theirs": "kept"})
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

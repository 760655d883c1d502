"""noise_source="microbatch" over a run: short steps, refusals, copies, checkpoints, hooks."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn

from poprisk_integrations import PopRiskAdamW
from tests.helpers.gradient_pieces import SETTINGS, backward, noise, pieces, take_step
from tests.helpers.optim_problem import feed, gradients, make_params, snapshot, unchanged


def test_a_short_step_leaves_s_alone():
    """The last step of an epoch may have one pass: no information, no error."""
    param = nn.Parameter(torch.zeros(9))
    optimizer = PopRiskAdamW([param], **SETTINGS)
    for count in (3, 1, 3):
        before = optimizer.state[param].get("exp_dev_sq", torch.zeros(9)).clone()
        take_step(optimizer, [param], torch.randn(count, 1, 9))
        assert torch.equal(before, optimizer.state[param]["exp_dev_sq"]) == (count == 1)
    state = optimizer.state[param]
    assert (state["step"].item(), state["dev_step"].item()) == (3, 2)


@pytest.mark.parametrize("resumed", [False, True])
def test_short_steps_are_refused_if_there_is_nothing_else(resumed):
    param = nn.Parameter(torch.zeros(9))
    optimizer = PopRiskAdamW([param], **SETTINGS)
    if resumed:  # a checkpoint may lie right before the short step of its epoch
        optimizer.init_state()
        take_step(optimizer, [param], torch.randn(1, 1, 9))
    optimizer.zero_grad()
    backward([param], [torch.randn(9)])
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="at least 2 backward passes per step, found 1"):
        optimizer.step()
    assert unchanged(optimizer, before)


def passes(params):
    for row in gradients(3):
        backward(params, row)


def by_hand(params, optimizer):
    feed(params, gradients(2)[1])


def one_by_hand(params, optimizer):
    for row in gradients(3):
        backward(params[:1] + params[2:], row[:1] + row[2:])
    params[1].grad = torch.ones_like(params[1])


def replaced(params, optimizer):
    optimizer.param_groups[0]["params"] = make_params()
    passes(optimizer.param_groups[0]["params"])


def clipped_by_value(params, optimizer):
    passes(params)
    nn.utils.clip_grad_value_(params, 0.1)


@pytest.mark.parametrize(
    ("source", "prepare", "message"),
    [
        ("ranks", lambda params, _: passes(params), r"'ranks' needs at least 2 ranks .* found 1"),
        ("microbatch", by_hand, r"'of layer 0' .* no backward pass has shown"),
        ("microbatch", one_by_hand, r"'of layer 1' .* no backward pass has shown"),
        ("microbatch", replaced, "no backward pass has shown"),
        ("microbatch", clipped_by_value, "no clipping by value"),
    ],
)
def test_refusals(source, prepare, message):
    params = make_params()
    named = [(f"of layer {i}", p) for i, p in enumerate(params)]
    optimizer = PopRiskAdamW(named, **{**SETTINGS, "noise_source": source})
    prepare(params, optimizer)
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()


def test_a_group_stays_out_if_refused(monkeypatch):
    from poprisk_integrations.optim import _noise_source

    first, second = make_params()[:2]
    optimizer = PopRiskAdamW([first], noise_source="temporal")
    monkeypatch.setattr(_noise_source, "is_dtensor", lambda p: p is second)
    with pytest.raises(ValueError, match="'microbatch' for parameter 0 of group 1, a DTensor"):
        optimizer.add_param_group({"params": [second], "noise_source": "microbatch"})
    assert len(optimizer.param_groups) == 1
    assert not second._backward_hooks


def test_templates_of_checkpoints_may_step_on_zero_gradients():
    """torch.distributed.checkpoint materialises states by a step on zeros with lr=0."""
    params = make_params()
    optimizer = PopRiskAdamW(params, **SETTINGS)
    optimizer.param_groups[0]["lr"] = 0.0
    feed(params, [torch.zeros_like(p) for p in params])
    optimizer.step()
    assert optimizer.state[params[0]]["dev_step"].item() == 0


def test_ungated_groups_have_no_hooks():
    params = make_params()
    PopRiskAdamW(params, noise_source="microbatch", gate_blend=0.0)
    PopRiskAdamW(params)
    optimizer = PopRiskAdamW(params, noise_source="microbatch", gate="none")
    assert not any(p._backward_hooks for p in params)
    feed(params, gradients(2)[1])
    optimizer.step()  # which needs no pieces


def test_hooks_go_with_the_optimizer():
    params = make_params()
    optimizer = PopRiskAdamW(params, **SETTINGS)
    assert [bool(p._backward_hooks) for p in params] == [bool(p.numel()) for p in params]
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    assert not any(p._backward_hooks for p in params)


@pytest.mark.parametrize("copier", ["deepcopy", "pickle"])
def test_copies_measure_for_themselves(copier):
    params = make_params()
    optimizer = PopRiskAdamW(params, **SETTINGS)
    history = pieces(steps=6, count=3)
    for rows in history[:3]:
        take_step(optimizer, params, rows)
    if copier == "deepcopy":
        twin = copy.deepcopy(optimizer)
    else:
        twin = pickle.load(io.BytesIO(pickle.dumps(optimizer)))
    clones = twin.param_groups[0]["params"]
    for rows in history[3:]:
        take_step(optimizer, params, rows)
        take_step(twin, clones, rows)
    assert all(torch.equal(a, b) for a, b in zip(params, clones, strict=True))
    for a, b in zip(noise(optimizer, params), noise(twin, clones), strict=True):
        assert torch.equal(a, b)


def test_checkpoints_bring_no_source():
    """How the noise is measured depends on how the run is started, as `foreach` does."""
    params = make_params()
    optimizer = PopRiskAdamW(params, **SETTINGS)
    history = pieces(steps=2, count=3)
    take_step(optimizer, params, history[0])
    saved = optimizer.state_dict()
    assert set(saved["state"][0]) == {"step", "dev_step", "exp_avg", "exp_avg_sq", "exp_dev_sq"}

    others = make_params()
    temporal = PopRiskAdamW(others, lr=1e-2, noise_source="temporal")
    temporal.load_state_dict(saved)
    assert temporal.param_groups[0]["noise_source"] == "temporal"
    assert not any(p._backward_hooks for p in others)
    feed(others, history[1][1])
    temporal.step()

    back = PopRiskAdamW(others, **SETTINGS)
    back.load_state_dict(temporal.state_dict())
    take_step(back, others, history[1])
    assert back.state[others[0]]["dev_step"].item() == 3


def test_a_gate_that_comes_with_the_checkpoint_is_measured():
    gated, ungated = make_params(), make_params()
    saved = PopRiskAdamW(gated, **SETTINGS).state_dict()
    optimizer = PopRiskAdamW(ungated, **SETTINGS, gate="none")
    optimizer.load_state_dict(saved)
    take_step(optimizer, ungated, gradients(3))
    assert optimizer.state[ungated[0]]["dev_step"].item() == 1


def test_parameters_unfrozen_later_start_one_step_later():
    first, second = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(5))
    second.requires_grad_(False)
    optimizer = PopRiskAdamW([first, second], **SETTINGS)
    for step in range(4):
        optimizer.zero_grad()
        second.requires_grad_(step >= 1)
        for _ in range(2):
            loss = (first * torch.randn(5)).sum() + (second * torch.randn(5)).sum()
            loss.backward()
        optimizer.step()
    counts = [optimizer.state[p]["dev_step"].item() for p in (first, second)]
    assert counts == [4, 2]
    assert optimizer.state[second]["step"].item() == 3


def test_conversion_of_the_module_keeps_the_hooks():
    layer = nn.Linear(4, 3)
    optimizer = PopRiskAdamW(layer.parameters(), **SETTINGS)
    layer.double()
    for _ in range(2):
        layer(torch.randn(5, 4, dtype=torch.float64)).square().mean().backward()
    optimizer.step()
    assert optimizer.state[layer.weight]["exp_dev_sq"].dtype == torch.float64
    assert (optimizer.state[layer.weight]["exp_dev_sq"] > 0).all()


def test_no_host_sync_after_the_first_step():
    """The same code on the meta device: reading a number of a meta tensor raises."""
    params = [nn.Parameter(torch.empty(4, 3, device="meta"))]
    optimizer = PopRiskAdamW(params, **SETTINGS, preserve_norm=True)
    rows = [[torch.empty(4, 3, device="meta")]] * 2
    with pytest.raises(RuntimeError, match="meta"):
        take_step(optimizer, params, rows)  # the one check of a run
    for record in optimizer._noise_source._records.values():
        record.is_verified = True
    for _ in range(2):
        take_step(optimizer, params, rows)

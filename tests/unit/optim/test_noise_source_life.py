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
from tests.helpers.gradient_pieces import (
    SETTINGS,
    backward,
    noise,
    pieces,
)
from tests.helpers.optim_problem import feed, gradients, make_params


class TestShortSteps:
    """The last step of an epoch may have one pass: no information, no error."""

    def test_leave_s_alone(self):
        params = [nn.Parameter(torch.zeros(9))]
        optimizer = PopRiskAdamW(params, **SETTINGS)
        for count in (3, 1, 3):
            optimizer.zero_grad()
            before = optimizer.state[params[0]].get("exp_dev_sq", torch.zeros(9)).clone()
            for _ in range(count):
                backward(params, [torch.randn(9)])
            optimizer.step()
            assert torch.equal(before, optimizer.state[params[0]]["exp_dev_sq"]) == (count == 1)
        state = optimizer.state[params[0]]
        assert (state["step"].item(), state["dev_step"].item()) == (3, 2)

    @pytest.mark.parametrize("resumed", [False, True])
    def test_are_refused_if_there_is_nothing_else(self, resumed):
        params = [nn.Parameter(torch.zeros(9))]
        optimizer = PopRiskAdamW(params, **SETTINGS)
        if resumed:  # a checkpoint may lie right before the short step of its epoch
            optimizer.init_state()
            backward(params, [torch.randn(9)])
            optimizer.step()
        optimizer.zero_grad()
        backward(params, [torch.randn(9)])
        before = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(RuntimeError, match="at least 2 backward passes per step, found 1"):
            optimizer.step()
        assert str(optimizer.state_dict()) == str(before)


class TestRefusals:
    def test_bad_value(self):
        with pytest.raises(ValueError, match=r"Invalid noise_source: 'batch'. Must be one of"):
            PopRiskAdamW(make_params(), noise_source="batch")

    @pytest.mark.parametrize("source", ["microbatch", "ranks"])
    def test_published_rule(self, source):
        with pytest.raises(ValueError, match="Must be 'temporal' with noise_mean='raw'"):
            PopRiskAdamW.paper(make_params(), noise_source=source)

    def test_ranks_on_one_process(self):
        params = make_params()
        optimizer = PopRiskAdamW(params, noise_source="ranks")
        backward(params, gradients(2)[1])
        with pytest.raises(RuntimeError, match=r"'ranks' needs at least 2 ranks .* found 1"):
            optimizer.step()
        assert not optimizer.state

    def test_gradients_set_by_hand(self):
        layer = nn.Linear(3, 2)
        optimizer = PopRiskAdamW(layer.named_parameters(), **SETTINGS)
        for p in layer.parameters():
            p.grad = torch.ones_like(p)
        with pytest.raises(RuntimeError, match=r"'weight' .* no backward pass has shown"):
            optimizer.step()
        assert not optimizer.state

    def test_one_gradient_set_by_hand(self):
        layer = nn.Linear(3, 2)
        optimizer = PopRiskAdamW(layer.named_parameters(), **SETTINGS)
        for _ in range(2):
            backward([layer.weight], [torch.randn(2, 3)])
        layer.bias.grad = torch.ones(2)
        with pytest.raises(RuntimeError, match=r"'bias' .* no backward pass has shown"):
            optimizer.step()

    def test_replaced_parameters(self):
        params = make_params()
        optimizer = PopRiskAdamW(params, **SETTINGS)
        others = make_params()
        optimizer.param_groups[0]["params"] = others
        for row in gradients(3):
            backward(others, row)
        with pytest.raises(RuntimeError, match="no backward pass has shown"):
            optimizer.step()

    def test_clipping_by_value(self):
        params = make_params()
        optimizer = PopRiskAdamW(params, **SETTINGS)
        for row in gradients(4):
            backward(params, row)
        nn.utils.clip_grad_value_(params, 0.1)
        with pytest.raises(RuntimeError, match="no clipping by value"):
            optimizer.step()

    def test_group_stays_out_if_refused(self, monkeypatch):
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
    PopRiskAdamW(params, noise_source="microbatch", gate="none")
    PopRiskAdamW(params, noise_source="microbatch", gate_blend=0.0)
    PopRiskAdamW(params)
    assert not any(p._backward_hooks for p in params)


def test_gate_none_is_adamw_with_one_pass():
    mine, theirs = make_params(), make_params()
    ours = PopRiskAdamW(mine, lr=1e-2, gate="none", noise_source="microbatch")
    adamw = torch.optim.AdamW(theirs, lr=1e-2)
    for row in gradients(5):
        for params, optimizer in ((mine, ours), (theirs, adamw)):
            feed(params, row)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


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

    def run(owned, opt, steps):
        for rows in steps:
            opt.zero_grad()
            for row in rows:
                backward(owned, row)
            opt.step()

    run(params, optimizer, history[:3])
    if copier == "deepcopy":
        twin = copy.deepcopy(optimizer)
    else:
        twin = pickle.load(io.BytesIO(pickle.dumps(optimizer)))
    clones = twin.param_groups[0]["params"]
    run(params, optimizer, history[3:])
    run(clones, twin, history[3:])
    assert all(torch.equal(a, b) for a, b in zip(params, clones, strict=True))
    for a, b in zip(noise(optimizer, params), noise(twin, clones), strict=True):
        assert torch.equal(a, b)


def test_checkpoints_bring_no_source():
    """How the noise is measured depends on how the run is started, as `foreach` does."""
    params = make_params()
    optimizer = PopRiskAdamW(params, **SETTINGS)
    history = pieces(steps=2, count=3)
    for row in history[0]:
        backward(params, row)
    optimizer.step()
    saved = optimizer.state_dict()
    assert set(saved["state"][0]) == {"step", "dev_step", "exp_avg", "exp_avg_sq", "exp_dev_sq"}

    others = make_params()
    temporal = PopRiskAdamW(others, lr=1e-2)
    temporal.load_state_dict(saved)
    assert temporal.param_groups[0]["noise_source"] == "temporal"
    assert not any(p._backward_hooks for p in others)
    feed(others, history[1][1])
    temporal.step()

    back = PopRiskAdamW(others, **SETTINGS)
    back.load_state_dict(temporal.state_dict())
    back.zero_grad()
    for row in history[1]:
        backward(others, row)
    back.step()
    assert back.state[others[0]]["dev_step"].item() == 3


def test_a_gate_that_comes_with_the_checkpoint_is_measured():
    gated, ungated = make_params(), make_params()
    saved = PopRiskAdamW(gated, **SETTINGS).state_dict()
    optimizer = PopRiskAdamW(ungated, **SETTINGS, gate="none")
    optimizer.load_state_dict(saved)
    for row in gradients(3):
        backward(ungated, row)
    optimizer.step()
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
    from poprisk_integrations.optim._noise_source import NoiseSource

    params = [nn.Parameter(torch.empty(4, 3, device="meta"))]
    optimizer = PopRiskAdamW(params, **SETTINGS, preserve_norm=True)
    source = optimizer.__dict__["_poprisk_noise_source"]
    assert isinstance(source, NoiseSource)
    backward(params, [torch.empty(4, 3, device="meta")])
    backward(params, [torch.empty(4, 3, device="meta")])
    with pytest.raises(RuntimeError, match="meta"):
        optimizer.step()  # the one check of a run
    for record in source._records.values():
        record.is_verified = True
    for _ in range(2):
        optimizer.zero_grad()
        backward(params, [torch.empty(4, 3, device="meta")])
        backward(params, [torch.empty(4, 3, device="meta")])
        optimizer.step()


def test_gradients_are_not_written():
    params = make_params()
    optimizer = PopRiskAdamW(params, **SETTINGS)
    for row in gradients(3, seed=7):
        backward(params, row)
    before = [p.grad.clone() for p in params]
    optimizer.step()
    assert all(torch.equal(p.grad, b) for p, b in zip(params, before, strict=True))

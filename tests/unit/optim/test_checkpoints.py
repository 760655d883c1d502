"""Checkpoints in and out: ours, AdamW's, and those that must be refused."""

import copy
import io

import pytest
import torch

from poprisk_integrations import PopRiskAdamW
from tests.helpers.optim_problem import feed, gradients, make_params, max_ulp, train


def through_disk(state_dict):
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def resume(params, source, cls=PopRiskAdamW, **kwargs):
    fresh = [torch.nn.Parameter(p.detach().clone()) for p in params]
    optimizer = cls(fresh, **kwargs)
    optimizer.load_state_dict(through_disk(source.state_dict()))
    return fresh, optimizer


def advance(params, optimizer, history):
    for row in history:
        feed(params, row)
        optimizer.step()
    return params


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"foreach": True}, {"capturable": True}, {"gate": "hard", "gate_warmup": 8}],
    ids=str,
)
def test_resumed_equals_uninterrupted_bitwise(options, dtype):
    history = gradients(20, dtype)
    whole, uninterrupted = train(
        lambda p: PopRiskAdamW(p, lr=1e-2, **options), history=history, dtype=dtype
    )
    params, optimizer = train(
        lambda p: PopRiskAdamW(p, lr=1e-2, **options), history=history[:11], dtype=dtype
    )
    params, optimizer = resume(params, optimizer, lr=123.0, **options)
    advance(params, optimizer, history[11:])
    assert optimizer.param_groups[0]["lr"] == 1e-2
    for a, b in zip(params, whole, strict=True):
        assert torch.equal(a, b)
        for key, value in uninterrupted.state[b].items():
            assert torch.equal(optimizer.state[a][key], value), key
            assert optimizer.state[a][key].dtype == value.dtype


def test_states_of_bfloat16_parameters_stay_float32_and_counts_stay_exact():
    params = [torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))]
    optimizer = PopRiskAdamW(params, lr=1e-3)
    for _ in range(301):  # 301 is 300 in bfloat16
        params[0].grad = torch.randn(3).bfloat16()
        optimizer.step()
    fresh, loaded = resume(params, optimizer)
    state = loaded.state[fresh[0]]
    assert state["dev_step"].item() == 300
    assert state["step"].item() == 301
    for key in ("exp_avg", "exp_avg_sq", "exp_dev_sq"):
        assert state[key].dtype == torch.float32
        assert torch.equal(state[key], optimizer.state[params[0]][key])


def test_loading_copies():
    params, optimizer = train(lambda p: PopRiskAdamW(p, lr=1e-2), steps=4, dtype=torch.bfloat16)
    saved = copy.deepcopy(optimizer.state_dict())
    fresh = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = PopRiskAdamW(fresh)
    kept = copy.deepcopy(saved)
    other.load_state_dict(saved)
    advance(fresh, other, gradients(3, torch.bfloat16))
    for index, state in kept["state"].items():
        for key, value in state.items():
            assert torch.equal(saved["state"][index][key], value), key


@pytest.mark.parametrize("source", [torch.optim.AdamW, torch.optim.Adam])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"capturable": True}], ids=str)
def test_adamw_checkpoint_in(source, fused, options):
    params, optimizer = train(lambda p: source(p, lr=3e-2, fused=fused), steps=6)
    fresh, ours = resume(params, optimizer, gate="hard", rho=0.9, **options)
    group = ours.param_groups[0]
    assert (group["gate"], group["rho"], group["lr"]) == ("hard", 0.9, 3e-2)
    assert not group["fused"]
    assert group["foreach"] == options.get("foreach")
    state = ours.state[fresh[0]]
    assert "exp_dev_sq" not in state
    grad = gradients(7)[6]
    mean = optimizer.state[params[0]]["exp_avg"] / (1 - 0.9**6)
    advance(fresh, ours, [grad])
    # One deviation so far, corrected by its own count: s_hat is that deviation itself.
    assert state["step"].item() == 7
    assert state["dev_step"].item() == 1
    s_hat = state["exp_dev_sq"] / (1 - 0.9)
    torch.testing.assert_close(s_hat, (grad[0] - mean).square(), rtol=1e-4, atol=1e-7)


def test_adamw_checkpoint_with_gate_none_continues_adamw_bitwise():
    history = gradients(20)
    whole, _ = train(lambda p: torch.optim.AdamW(p, lr=1e-2), history=history)
    params, optimizer = train(lambda p: torch.optim.AdamW(p, lr=1e-2), history=history[:9])
    params, ours = resume(params, optimizer, gate="none")
    assert max_ulp(advance(params, ours, history[9:]), whole) == 0.0


def test_per_group_options_survive_an_adamw_checkpoint():
    params = make_params()
    optimizer = torch.optim.AdamW([{"params": params[:1]}, {"params": params[1:]}])
    advance(params, optimizer, gradients(2))
    fresh = make_params()
    ours = PopRiskAdamW([{"params": fresh[:1], "gate": "none"}, {"params": fresh[1:]}])
    ours.load_state_dict(optimizer.state_dict())
    assert [g["gate"] for g in ours.param_groups] == ["none", "soft"]


def test_ours_into_adamw():
    history = gradients(20)
    params, optimizer = train(lambda p: PopRiskAdamW(p, lr=1e-2), history=history[:9])
    fresh, theirs = resume(params, optimizer, cls=torch.optim.AdamW)
    twin = [torch.nn.Parameter(p.detach().clone()) for p in params]
    ours = PopRiskAdamW(twin)
    ours.load_state_dict(optimizer.state_dict())
    for group in ours.param_groups:
        group["gate"] = "none"
    advance(fresh, theirs, history[9:])
    advance(twin, ours, history[9:])
    assert max_ulp(fresh, twin) == 0.0


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adamax(p),
        lambda p: torch.optim.RMSprop(p),
        lambda p: torch.optim.Adagrad(p),
    ],
)
def test_another_optimizers_state_is_refused_and_nothing_is_lost(make):
    params, foreign = train(make, steps=2)
    fresh, ours = train(lambda p: PopRiskAdamW(p, lr=1e-2), steps=3)
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(ValueError, match="Not a PopRiskAdamW or AdamW checkpoint"):
        ours.load_state_dict(foreign.state_dict())
    after = ours.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, state in before["state"].items():
        assert all(torch.equal(after["state"][index][k], v) for k, v in state.items())
    del params, fresh


def test_amsgrad_and_other_shapes_are_refused():
    params, foreign = train(lambda p: torch.optim.AdamW(p, amsgrad=True), steps=2)
    with pytest.raises(ValueError, match="Invalid amsgrad in the checkpoint: True"):
        PopRiskAdamW(make_params()).load_state_dict(foreign.state_dict())
    small = [torch.nn.Parameter(torch.zeros(2)) for _ in params]
    _, ours = train(lambda p: PopRiskAdamW(p), steps=2)
    with pytest.raises(ValueError, match=r"exp_avg of parameter 0 has the shape \(5, 7\)"):
        PopRiskAdamW(small).load_state_dict(ours.state_dict())


def test_user_hooks_see_restored_states():
    params, optimizer = train(lambda p: PopRiskAdamW(p), steps=2, dtype=torch.bfloat16)
    fresh = make_params(torch.bfloat16)
    loaded = PopRiskAdamW(fresh)
    seen = []
    loaded.register_load_state_dict_post_hook(
        lambda opt: seen.append(opt.state[fresh[0]]["exp_avg"].dtype)
    )
    loaded.load_state_dict(optimizer.state_dict())
    assert seen == [torch.float32]
    assert len(loaded._optimizer_load_state_dict_post_hooks) == 1
    del params


def test_empty_state_round_trip():
    """Wrappers load the state of a fresh optimizer into itself."""
    optimizer = PopRiskAdamW(make_params(), gate="snr")
    optimizer.load_state_dict(optimizer.state_dict())
    assert not optimizer.state
    assert optimizer.param_groups[0]["gate"] == "snr"


def test_group_keys_survive_a_round_trip():
    optimizer = PopRiskAdamW(make_params())
    before = set(optimizer.param_groups[0])
    optimizer.load_state_dict(through_disk(optimizer.state_dict()))
    assert set(optimizer.param_groups[0]) == before


def test_init_state_makes_a_template_without_a_step():
    params = make_params()
    optimizer = PopRiskAdamW(params)
    optimizer.init_state()
    for param in params:
        assert optimizer.state[param]["step"].item() == 0
        assert optimizer.state[param]["exp_dev_sq"].shape == param.shape
    whole, _ = train(lambda p: PopRiskAdamW(p, lr=1e-3), steps=5)
    advance(params, optimizer, gradients(5))
    assert max_ulp(params, whole) == 0.0


def test_distributed_checkpoint_template_is_inert():
    """torch's DCP helper materialises states with a zero-gradient step at lr=0."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = torch.nn.Linear(3, 2)
    start = copy.deepcopy(model.state_dict())
    optimizer = PopRiskAdamW(model.parameters(), lr=0.5)
    optimizer.init_state()
    state = get_optimizer_state_dict(model, optimizer)
    assert all(torch.equal(v, start[k]) for k, v in model.state_dict().items())
    assert optimizer.state[model.weight]["step"].item() == 0
    assert set(state["state"]["weight"]) >= {"exp_dev_sq", "dev_step"}

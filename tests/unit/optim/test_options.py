"""Bad values are refused by name before anything happens; pickles and copies keep everything."""

import copy
import io
import pickle

import pytest
import torch

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.optim._work import GroupWork
from tests.helpers.optim_problem import feed, gradients, make_params


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "Invalid learning rate: -1.0. Must be a number >= 0"),
        ({"lr": float("nan")}, "Invalid learning rate: nan"),
        ({"lr": torch.ones(2)}, "Tensor lr must be 1-element"),
        (
            {"betas": (1.0, 0.999)},
            r"Invalid beta parameter at index 0: 1.0. Must be a float in \[0, 1\)",
        ),
        ({"betas": (0.9,)}, "Invalid betas"),
        ({"eps": -1e-8}, "Invalid eps value: -1e-08"),
        ({"weight_decay": -1}, "Invalid weight_decay value: -1"),
        ({"gate": "soft "}, "Invalid gate: 'soft '. Must be one of"),
        ({"alpha": "big"}, "Invalid alpha: 'big'"),
        ({"alpha": -0.1}, "Invalid alpha: -0.1"),
        ({"alpha": "finite"}, "alpha='finite' needs batch_size and dataset_size"),
        ({"alpha": "finite", "batch_size": 9, "dataset_size": 9}, "Invalid dataset_size: 9"),
        ({"false_open_rate": 0.0}, "Invalid false_open_rate: 0.0"),
        ({"lambda_pop": -1.0}, "Invalid lambda_pop: -1.0"),
        ({"rho": 1.0}, "Invalid rho: 1.0"),
        ({"gate_warmup": -1}, "Invalid gate_warmup: -1"),
        ({"gate_warmup": 1.5}, "Invalid gate_warmup: 1.5"),
        ({"gate_blend": 1.1}, "Invalid gate_blend: 1.1"),
        ({"preserve_norm": "yes"}, "Invalid preserve_norm: 'yes'"),
        ({"batch_size": 0}, "Invalid batch_size: 0"),
        ({"dataset_size": 2.5}, "Invalid dataset_size: 2.5"),
        ({"foreach": "auto"}, "Invalid foreach: 'auto'"),
        ({"fused": "yes"}, "Invalid fused: 'yes'"),
        ({"fused": True, "foreach": True}, "Invalid foreach and fused: both True"),
        ({"differentiable": True}, "Invalid differentiable: True"),
        ({"rounding_seed": 1 << 31}, "Invalid rounding_seed"),
        ({"state_dtype": "4bit"}, "Invalid state_dtype: '4bit'"),
        ({"state_dtype": {"exp_sq": "8bit"}}, "Invalid state_dtype: {'exp_sq'"),
        ({"noise_mean": "median"}, "Invalid noise_mean: 'median'"),
        ({"collect_stats_every": -2}, "Invalid collect_stats_every: -2"),
        ({"gate_eps": -1e-12}, "Invalid gate_eps value"),
    ],
    ids=str,
)
def test_bad_values_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        PopRiskAdamW(make_params(), **options)
    params = make_params()
    with pytest.raises(ValueError, match=message):
        PopRiskAdamW([{"params": params, **options}])
    optimizer = PopRiskAdamW(params[:1])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": params[1:], **options})
    assert len(optimizer.param_groups) == 1


def test_unknown_option_is_a_type_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'gates'"):
        PopRiskAdamW(make_params(), gates="soft")


def test_float16_parameters_are_refused():
    with pytest.raises(ValueError, match=r"Invalid parameter dtype: torch.float16"):
        PopRiskAdamW([torch.nn.Parameter(torch.zeros(2, dtype=torch.float16))])


def test_same_order_as_adamw():
    """lr, betas, eps, weight_decay are positional as in torch.optim.AdamW."""
    group = PopRiskAdamW(make_params(), 0.1, (0.8, 0.9), 1e-6, 0.3).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (
        0.1,
        (0.8, 0.9),
        1e-6,
        0.3,
    )


def test_path_is_the_single_tensor_one_on_cpu():
    assert PopRiskAdamW(make_params()).path == "single_tensor"
    assert PopRiskAdamW(make_params(), foreach=True).path == "foreach"
    assert PopRiskAdamW(make_params(), capturable=True).path == "capturable"
    first, *rest = make_params()
    mixed = PopRiskAdamW([{"params": [first], "foreach": True}, {"params": rest}])
    assert mixed.path == "foreach+single_tensor"


def test_the_path_that_is_named_is_the_one_that_runs(monkeypatch):
    from poprisk_integrations.optim import _paths as module

    calls = []
    names = {
        "single_tensor": "_single_tensor_poprisk_adamw",
        "foreach": "_multi_tensor_poprisk_adamw",
        "capturable": "_capturable_poprisk_adamw",
        "fused_compiled": "compiled_poprisk_adamw",
    }
    monkeypatch.setattr(module, "compiler_is_found", lambda: True)
    for path, name in names.items():
        # what a fused path returns are the parameters that it leaves to others
        monkeypatch.setattr(module, name, lambda *_, _path=path: calls.append(_path) or GroupWork())
    for options in ({}, {"foreach": True}, {"capturable": True}, {"fused": True}):
        params = make_params()
        optimizer = PopRiskAdamW(params, **options)
        feed(params, gradients(1)[0])
        optimizer.step()
        assert calls.pop() == optimizer.path
        assert not calls


def test_named_parameters_are_kept():
    layer = torch.nn.Linear(2, 1)
    group = PopRiskAdamW(layer.named_parameters()).param_groups[0]
    assert group["param_names"] == ["weight", "bias"]


@pytest.mark.parametrize("copier", ["deepcopy", "pickle"])
def test_copies_continue_bitwise(copier):
    params = make_params()
    optimizer = PopRiskAdamW(params, lr=1e-2, gate="snr", collect_stats_every=2)
    history = gradients(10)
    for row in history[:5]:
        feed(params, row)
        optimizer.step()
    if copier == "deepcopy":
        twin = copy.deepcopy(optimizer)
    else:
        twin = pickle.load(io.BytesIO(pickle.dumps(optimizer)))
    clones = twin.param_groups[0]["params"]
    for row in history[5:]:
        for group, opt in ((params, optimizer), (clones, twin)):
            feed(group, row)
            opt.step()
    assert all(torch.equal(a, b) for a, b in zip(params, clones, strict=True))
    assert twin.gate_stats()


def test_an_older_pickle_gets_the_missing_options():
    optimizer = PopRiskAdamW(make_params(), lr=1e-2)
    state = optimizer.__getstate__()
    for group in (state["defaults"], *state["param_groups"]):
        group.pop("gate_decay")
    fresh = PopRiskAdamW.__new__(PopRiskAdamW)
    fresh.__setstate__(state)
    assert fresh.param_groups[0]["gate_decay"] is False


def test_parameters_added_and_unfrozen_later_count_their_own_steps():
    first, second = make_params()[0], make_params()[1]
    optimizer = PopRiskAdamW([first], lr=1e-2)
    for step in range(6):
        if step == 3:
            optimizer.add_param_group({"params": [second], "gate": "hard"})
        first.grad = torch.ones_like(first)
        second.grad = torch.ones_like(second)
        optimizer.step()
    assert optimizer.state[first]["step"].item() == 6
    assert optimizer.state[second]["step"].item() == 3


@pytest.mark.parametrize("foreach", [True, False])
def test_channels_last_and_strided_parameters(foreach):
    torch.manual_seed(0)
    base = torch.randn(2, 3, 4, 5)
    plain = torch.nn.Parameter(base.clone())
    last = torch.nn.Parameter(base.clone().to(memory_format=torch.channels_last))
    for step in range(4):
        grad = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(step))
        plain.grad, last.grad = grad.clone(), grad.clone()
        if step == 0:
            optimizers = [PopRiskAdamW([p], lr=1e-2, foreach=foreach) for p in (plain, last)]
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(plain, last)
    assert optimizers[1].state[last]["exp_dev_sq"].is_contiguous(memory_format=torch.channels_last)


def test_state_keys_and_dtypes():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        params = make_params(dtype)
        optimizer = PopRiskAdamW(params)
        feed(params, gradients(2, dtype)[1])
        optimizer.step()
        for param in params:
            state = optimizer.state[param]
            assert sorted(state) == ["dev_step", "exp_avg", "exp_avg_sq", "exp_dev_sq", "step"]
            expected = torch.float64 if dtype == torch.float64 else torch.float32
            for key in ("exp_avg", "exp_avg_sq", "exp_dev_sq"):
                assert state[key].dtype == expected
                assert state[key].shape == param.shape
            for key in ("step", "dev_step"):
                assert state[key].shape == ()
                assert state[key].dtype == torch.float32

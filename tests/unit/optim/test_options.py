"""Bad options, parameters and groups are refused by name before anything changes."""

import re

import numpy as np
import pytest
import torch

from poprisk_integrations import PopRiskAdamW
from tests.helpers.optim_problem import feed, gradients, make_params, snapshot, unchanged
from tests.unit.optim.paths import EAGER, FLAGS, needs_cuda

BAD = [
    ({"lr": -1.0}, "Invalid learning rate: -1.0. Must be a number >= 0"),
    ({"lr": float("nan")}, "Invalid learning rate: nan"),
    ({"lr": torch.ones(2)}, "Invalid learning rate: tensor"),
    ({"lr": -torch.ones(1)}, "Invalid learning rate: tensor"),
    ({"lr": "1e-3"}, "Invalid learning rate: '1e-3'"),
    ({"betas": (1.0, 0.999)}, r"Invalid betas: \(1.0, 0.999\). Must be two numbers in \[0, 1\)"),
    ({"betas": (0.9,)}, "Invalid betas"),
    ({"betas": 0.9}, "Invalid betas: 0.9"),
    ({"eps": -1e-8}, "Invalid eps: -1e-08"),
    ({"eps": float("inf")}, "Invalid eps: inf"),
    ({"weight_decay": -1}, "Invalid weight_decay: -1"),
    ({"gate": "soft "}, r"Invalid gate: 'soft '. Must be one of \('soft', "),
    ({"alpha": "big"}, "Invalid alpha: 'big'"),
    ({"alpha": -0.1}, "Invalid alpha: -0.1"),
    ({"alpha": "finite"}, "alpha='finite' needs batch_size and dataset_size"),
    ({"alpha": "finite", "batch_size": 9, "dataset_size": 9}, "Invalid dataset_size: 9"),
    ({"false_open_rate": 0.0}, "Invalid false_open_rate: 0.0"),
    ({"lambda_pop": -1.0}, "Invalid lambda_pop: -1.0. Must be a number >= 0, or None"),
    ({"rho": 1.0}, r"Invalid rho: 1.0. Must be in \[0, 1\)"),
    ({"gate_warmup": -1}, "Invalid gate_warmup: -1"),
    ({"gate_warmup": 1.5}, "Invalid gate_warmup: 1.5. Must be an integer >= 0"),
    ({"gate_blend": 1.1}, r"Invalid gate_blend: 1.1. Must be in \[0, 1\]"),
    ({"preserve_norm": "yes"}, "Invalid preserve_norm: 'yes'. Must be True or False"),
    ({"batch_size": 0}, "Invalid batch_size: 0. Must be an integer >= 1, or None"),
    ({"dataset_size": 2.5}, "Invalid dataset_size: 2.5"),
    ({"foreach": "auto"}, "Invalid foreach: 'auto'. Must be None, True or False"),
    ({"fused": "yes"}, "Invalid fused: 'yes'"),
    ({"fused": True, "foreach": True}, "Invalid foreach and fused: both True"),
    ({"maximize": 1}, "Invalid maximize: 1"),
    ({"capturable": None}, "Invalid capturable: None"),
    ({"capturable": torch.tensor(True)}, "Invalid capturable: tensor"),
    ({"differentiable": True}, "Invalid differentiable: True"),
    ({"rounding_seed": 1 << 31}, "Invalid rounding_seed"),
    ({"state_dtype": "4bit"}, "Invalid state_dtype: '4bit'"),
    ({"state_dtype": {"exp_sq": "8bit"}}, "Invalid state_dtype: {'exp_sq'"),
    ({"noise_mean": "median"}, "Invalid noise_mean: 'median'"),
    ({"noise_source": "batch"}, "Invalid noise_source: 'batch'"),
    (
        {"noise_source": "ranks", "noise_mean": "raw"},
        "Must be 'temporal' with noise_mean='raw'",
    ),
    (
        {"noise_source": "microbatch", "state_dtype": "bfloat16"},
        "Invalid state_dtype: 'bfloat16' for exp_dev_sq",
    ),
    ({"collect_stats_every": -2}, "Invalid collect_stats_every: -2"),
    ({"gate_eps": -1e-12}, "Invalid gate_eps: -1e-12"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=str)
def test_bad_values_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        PopRiskAdamW(make_params(), **options)
    params = make_params()
    with pytest.raises(ValueError, match=message):
        PopRiskAdamW([{"params": params, **options}])
    optimizer = PopRiskAdamW(params[:1])
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": params[1:], **options})
    assert unchanged(optimizer, before)


LEAF, OTHER = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))


@pytest.mark.parametrize(
    ("params", "options", "error", "message"),
    [
        (LEAF, {}, TypeError, "should be an iterable of Tensors or dicts"),
        ([], {}, ValueError, "empty parameter list"),
        ([1.0], {}, TypeError, "can only optimize Tensors"),
        ([LEAF * 2], {}, ValueError, "can't optimize a non-leaf Tensor"),
        ([{"params": {LEAF}}], {}, TypeError, "ordered collections"),
        (
            [{"params": [LEAF]}, {"params": [LEAF, OTHER]}],
            {},
            ValueError,
            "some parameters appear in more than one parameter group",
        ),
        ([LEAF], {"amsgrad": True}, TypeError, "unexpected keyword argument 'amsgrad'"),
    ],
)
def test_errors_of_torch(params, options, error, message):
    with pytest.raises(error, match=message):
        PopRiskAdamW(params, **options)


@pytest.mark.parametrize("number", [np.float32(0.25), np.float64(0.25), np.int64(0)], ids=repr)
def test_numpy_numbers_are_numbers(number):
    """torch.optim.AdamW takes them; configurations read from arrays hold them."""
    optimizer = PopRiskAdamW(make_params(), lr=number, weight_decay=number, eps=number, rho=number)
    assert optimizer.param_groups[0]["rho"] == float(number)


@pytest.mark.parametrize("dtype", [torch.float16, torch.complex32, torch.float8_e4m3fn], ids=str)
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_unsupported_dtypes_are_refused_before_the_first_step(dtype):
    good = make_params()
    bad = torch.nn.Parameter(torch.zeros(2).to(dtype))
    message = re.escape(f"Invalid parameter dtype: {dtype}")
    with pytest.raises(ValueError, match=message):
        PopRiskAdamW([*good, bad])
    optimizer = PopRiskAdamW(good)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [bad]})
    assert unchanged(optimizer, before)


@pytest.mark.parametrize("impl", EAGER)
def test_devices_are_not_mixed_in_a_group(impl):
    """The meta device stands for the second one."""
    here, there = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2).to("meta"))
    with pytest.raises(ValueError, match=r"Invalid parameter devices: \['cpu', 'meta'\]"):
        PopRiskAdamW([here, there], **FLAGS[impl])
    optimizer = PopRiskAdamW([here], **FLAGS[impl])
    optimizer.add_param_group({"params": [there]})
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_cuda)])
def test_one_device_per_group(device):
    here, there = make_params(), [torch.nn.Parameter(p.detach().to(device)) for p in make_params()]
    optimizer = PopRiskAdamW([{"params": here}, {"params": there}])
    for row in gradients(4):
        feed(here, row)
        feed(there, [None if g is None else g.to(device) for g in row])
        optimizer.step()
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-5, atol=1e-6)


def test_same_order_as_adamw():
    """lr, betas, eps, weight_decay are positional as in torch.optim.AdamW."""
    group = PopRiskAdamW(make_params(), 0.1, (0.8, 0.9), 1e-6, 0.3).param_groups[0]
    found = (group["lr"], group["betas"], group["eps"], group["weight_decay"])
    assert found == (0.1, (0.8, 0.9), 1e-6, 0.3)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize("fused", [None, False])
def test_a_step_is_captured_in_a_graph_and_replayed(device, fused):
    param, twin = (torch.nn.Parameter(torch.ones(4, 3, device=device)) for _ in range(2))
    lr = torch.tensor(1e-2, device=device)
    optimizer = PopRiskAdamW([param], lr=lr, capturable=True, fused=fused)
    reference = PopRiskAdamW([twin], lr=1e-2, capturable=True, fused=fused)
    rows = [torch.randn(4, 3, device=device) for _ in range(6)]
    param.grad = rows[0].clone()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for row in rows[1:]:
        param.grad.copy_(row)
        graph.replay()
    for row in rows:
        twin.grad = row
        reference.step()
    torch.testing.assert_close(param, twin)

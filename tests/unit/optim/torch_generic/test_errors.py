"""Bad input is refused by name, before anything changes."""

import copy
import re

import numpy as np
import pytest
import torch

from poprisk_integrations import PopRiskAdamW
from tests.helpers.optim_problem import feed, gradients, make_params, train
from tests.unit.optim.torch_generic.optimizer_info import (
    EAGER,
    IMPLEMENTATIONS,
    INFO,
    OptimizerErrorEnum,
    needs_cuda,
    snapshot,
    unchanged,
)

ERRORS = INFO.optim_error_inputs_func("cpu", torch.float32)


@pytest.mark.parametrize("case", [pytest.param(e, id=e.optimizer_error_input.desc) for e in ERRORS])
def test_constructor(case):
    assert case.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
    wrong = case.optimizer_error_input
    params = make_params() if wrong.params is None else wrong.params
    with pytest.raises(case.error_type, match=case.error_regex):
        INFO.optim_cls(params, **wrong.kwargs)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(e, id=e.optimizer_error_input.desc)
        for e in ERRORS
        # A group may hold names that the optimizer does not know, as in torch.
        if e.optimizer_error_input.params is None and e.optimizer_error_input.desc != "amsgrad"
    ],
)
def test_added_group_is_refused_and_nothing_is_added(case):
    params, optimizer = train(lambda p: PopRiskAdamW(p[:2]), steps=0)
    wrong = case.optimizer_error_input.kwargs
    before = snapshot(optimizer)
    with pytest.raises(case.error_type, match=case.error_regex):
        optimizer.add_param_group({"params": params[2:], **wrong})
    assert unchanged(optimizer, before)


def test_duplicates_warn():
    param = torch.nn.Parameter(torch.ones(2))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        PopRiskAdamW([param, param])


@pytest.mark.parametrize("number", [np.float32(0.25), np.float64(0.25), np.int64(0)], ids=repr)
def test_numpy_numbers_are_numbers(number):
    """torch.optim.AdamW takes them; configurations read from arrays hold them."""
    optimizer = PopRiskAdamW(make_params(), lr=number, weight_decay=number, eps=number, rho=number)
    assert optimizer.param_groups[0]["rho"] == float(number)


@pytest.mark.parametrize("impl", EAGER)
@pytest.mark.parametrize("groups", [1, 2])
def test_sparse_gradient_changes_nothing(impl, groups):
    """Also where the dense parameters of earlier groups were already looked at."""
    dense, table = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3, 2))
    given = [dense, table] if groups == 1 else [{"params": [dense]}, {"params": [table]}]
    optimizer = PopRiskAdamW(given, **IMPLEMENTATIONS[impl])
    before = snapshot(optimizer)
    dense.grad = torch.ones(3)
    torch.nn.functional.embedding(torch.tensor([1]), table, sparse=True).sum().backward()
    assert table.grad.is_sparse
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert unchanged(optimizer, before)
    assert not optimizer.state


@pytest.mark.parametrize("dtype", [torch.float16, torch.complex32, torch.float8_e4m3fn], ids=str)
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_unsupported_dtypes_are_refused_before_the_first_step(dtype):
    good = make_params()
    bad = torch.nn.Parameter(torch.zeros(2).to(dtype))
    message = f"Invalid parameter dtype: {dtype}"
    with pytest.raises(ValueError, match=re.escape(message)):
        PopRiskAdamW([*good, bad])
    optimizer = PopRiskAdamW(good)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.add_param_group({"params": [bad]})
    assert unchanged(optimizer, before)


@pytest.mark.parametrize("impl", EAGER)
def test_devices_are_not_mixed_in_a_group(impl):
    """The meta device stands for the second one."""
    here, there = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2).to("meta"))
    with pytest.raises(ValueError, match=r"Invalid parameter devices: \['cpu', 'meta'\]"):
        PopRiskAdamW([here, there], **IMPLEMENTATIONS[impl])
    optimizer = PopRiskAdamW([here], **IMPLEMENTATIONS[impl])
    optimizer.add_param_group({"params": [there]})
    assert len(optimizer.param_groups) == 2


@needs_cuda
@pytest.mark.gpu
def test_one_device_per_group_on_cpu_and_cuda():
    here, there = make_params(), [torch.nn.Parameter(p.detach().cuda()) for p in make_params()]
    optimizer = PopRiskAdamW([{"params": here}, {"params": there}])
    for row in gradients(4):
        feed(here, row)
        feed(there, [None if g is None else g.cuda() for g in row])
        optimizer.step()
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-5, atol=1e-6)


def saved_run():
    params, optimizer = train(lambda p: PopRiskAdamW(p, lr=1e-2), steps=3)
    return params, optimizer, copy.deepcopy(optimizer.state_dict())


def without(key):
    def change(saved):
        del saved["state"][0][key]

    return change


def with_state(key, value):
    def change(saved):
        saved["state"][0][key] = value

    return change


def with_option(name, value):
    def change(saved):
        saved["param_groups"][0][name] = value

    return change


def not_ours(saved):
    saved["state"][0]["momentum_buffer"] = torch.zeros(5, 7)
    del saved["state"][0]["dev_step"]


def one_group_more(saved):
    saved["param_groups"].append({**saved["param_groups"][0], "params": []})


def one_parameter_less(saved):
    saved["param_groups"][0]["params"].pop()


BAD_STATES = {
    "no exp_avg": (without("exp_avg"), "Not a PopRiskAdamW or AdamW checkpoint"),
    "no exp_avg_sq": (without("exp_avg_sq"), "Not a PopRiskAdamW or AdamW checkpoint"),
    "no step": (without("step"), "Not a PopRiskAdamW or AdamW checkpoint"),
    "another optimizer": (not_ours, "momentum_buffer"),
    "exp_avg shape": (with_state("exp_avg", torch.zeros(7, 5)), r"exp_avg .* \(7, 5\)"),
    "exp_avg_sq shape": (with_state("exp_avg_sq", torch.zeros(35)), r"exp_avg_sq .* \(35,\)"),
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
    "amsgrad": (with_option("amsgrad", True), "Invalid amsgrad in the checkpoint"),
    "lr": (with_option("lr", -1.0), "Invalid learning rate: -1.0"),
    "gate": (with_option("gate", "sotf"), "Invalid gate: 'sotf'"),
    "finite without sizes": (with_option("alpha", "finite"), "alpha='finite' needs"),
    "more groups": (one_group_more, "different number of parameter groups"),
    "fewer parameters": (one_parameter_less, "doesn't match the size of optimizer's group"),
}


@pytest.mark.parametrize(("change", "message"), BAD_STATES.values(), ids=BAD_STATES)
def test_a_state_that_does_not_fit_is_refused_and_nothing_changes(change, message):
    _, _, saved = saved_run()
    change(saved)
    _, optimizer = train(lambda p: PopRiskAdamW(p, lr=3e-3, gate="snr"), steps=5)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert unchanged(optimizer, before)
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    assert not optimizer._optimizer_load_state_dict_post_hooks


def test_what_these_checks_let_through():
    """The unchanged state loads, and so does one whose counts are plain numbers."""
    _, source, saved = saved_run()
    saved["state"][0]["step"] = 3
    saved["state"][2]["dev_step"] = torch.tensor([2.0])
    _, optimizer = train(lambda p: PopRiskAdamW(p, lr=3e-3), steps=5)
    optimizer.load_state_dict(saved)
    assert unchanged(optimizer, (source.state_dict(), snapshot(optimizer)[1]))


@pytest.mark.parametrize("value", [1, None, "cuda", torch.tensor(True)], ids=repr)
def test_capturable_is_a_bool(value):
    with pytest.raises(ValueError, match="Invalid capturable"):
        PopRiskAdamW(make_params(), capturable=value)


def test_capturable_may_be_switched_between_steps():
    """On CPU no step count has to move; the trajectory goes on."""
    history = gradients(20)
    expected, _ = train(lambda p: PopRiskAdamW(p, lr=1e-2), history=history)
    params, optimizer = train(lambda p: PopRiskAdamW(p, lr=1e-2), history=history[:7])
    for group in optimizer.param_groups:
        group["capturable"] = True
    assert optimizer.path == "capturable"
    for row in history[7:]:
        feed(params, row)
        optimizer.step()
    for a, e in zip(params, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)


@needs_cuda
@pytest.mark.gpu
def test_a_step_is_captured_in_a_graph_and_replayed():
    param, twin = (torch.nn.Parameter(torch.ones(4, 3, device="cuda")) for _ in range(2))
    optimizer = PopRiskAdamW([param], lr=torch.tensor(1e-2, device="cuda"), capturable=True)
    reference = PopRiskAdamW([twin], lr=1e-2, capturable=True)
    rows = [torch.randn(4, 3, device="cuda") for _ in range(6)]
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

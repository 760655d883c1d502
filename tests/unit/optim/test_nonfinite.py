"""A non-finite gradient leaves no trace and is counted; gradients are never written."""

import copy

import pytest
import torch

from poprisk_integrations import PopRiskAdamW
from tests.helpers.optim_problem import feed, gradients, make_params

PATHS = {
    "single_tensor": {"foreach": False},
    "foreach": {"foreach": True},
    "capturable": {"capturable": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("path", PATHS)
def test_skip_leaves_no_trace(path, bad, dtype):
    def run(poisoned):
        params = make_params(dtype)
        optimizer = PopRiskAdamW(params, lr=1e-2, collect_stats_every=1, **PATHS[path])
        for step, row in enumerate(gradients(10, dtype)):
            if step in poisoned:
                feed(params, row)
                params[0].grad[1, 2] = bad
                before = copy.deepcopy(optimizer.state_dict()), [p.clone() for p in params]
                optimizer.step()
                for p, b in zip(params, before[1], strict=True):
                    assert torch.equal(p, b)
                after = optimizer.state_dict()["state"]
                for index, state in before[0]["state"].items():
                    for key, value in state.items():
                        assert torch.equal(after[index][key], value), key
            feed(params, row)
            optimizer.step()
        return params, optimizer

    clean, _ = run(())
    skipped, optimizer = run((0, 4, 9))
    assert all(torch.equal(a, b) for a, b in zip(clean, skipped, strict=True))
    assert optimizer.skipped_nonfinite == 3
    assert float(optimizer.gate_stats()["skipped_nonfinite"]) == 3


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("maximize", [True, False])
def test_gradients_are_never_written(path, maximize):
    params = make_params()
    optimizer = PopRiskAdamW(params, lr=1e-2, maximize=maximize, preserve_norm=True, **PATHS[path])
    for row in gradients(4):
        feed(params, row)
        pointers = [None if p.grad is None else p.grad.data_ptr() for p in params]
        optimizer.step()
        for param, grad, pointer in zip(params, row, pointers, strict=True):
            if grad is not None:
                assert torch.equal(param.grad, grad)
                assert param.grad.data_ptr() == pointer


def test_grad_scaler_skips_and_unscales():
    """A plain GradScaler never calls step() on overflow; state stays as it was."""
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = PopRiskAdamW([param], lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for bad in (False, True, False):
        optimizer.zero_grad()
        loss = (param * torch.tensor([1.0, 2.0, float("inf") if bad else 3.0])).sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.state[param]["step"].item() == 2
    assert torch.isfinite(param).all()


def test_no_host_sync_in_step():
    """On an accelerator's path nothing is read back: the same code on the meta device shows it."""
    params = [torch.nn.Parameter(torch.empty(4, 3, device="meta"))]
    optimizer = PopRiskAdamW(
        params, lr=1e-2, gate="soft", preserve_norm=True, collect_stats_every=1
    )
    assert optimizer.path == "capturable"
    for _ in range(3):
        params[0].grad = torch.empty(4, 3, device="meta")
        optimizer.step()  # .item(), bool() or float() of a meta tensor would raise
    with pytest.raises(RuntimeError, match="meta"):
        _ = optimizer.state[params[0]]["step"].item()


def test_sparse_gradient_is_refused():
    embedding = torch.nn.Embedding(5, 2, sparse=True)
    optimizer = PopRiskAdamW(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert not optimizer.state


def test_step_without_gradients_is_a_no_op():
    params = make_params()
    optimizer = PopRiskAdamW(params)
    optimizer.step()
    assert not optimizer.state


def test_the_check_can_be_left_to_others():
    """As AdamW: NaN spreads, and only there."""
    params = make_params()
    optimizer = PopRiskAdamW(params, skip_nonfinite=False)
    row = gradients(2)[1]
    row[0][0, 0] = torch.nan
    feed(params, row)
    optimizer.step()
    assert optimizer.skipped_nonfinite == 0
    assert params[0].isnan().nonzero().tolist() == [[0, 0]]
    assert not params[1].isnan().any()

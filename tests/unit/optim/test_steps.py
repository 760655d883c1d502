"""Steps that must do nothing, what no step may touch, and what a step needs."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.optim import _work
from tests.helpers.optim_problem import feed, gradients, make_params, snapshot, temporal, unchanged
from tests.unit.optim.paths import EAGER, EVERY, FLAGS, TORCH, needs_cuda

MOMENTS = ("exp_avg", "exp_avg_sq", "exp_dev_sq")


UNLIKE = [{}, {"maximize": True}, {"gate_decay": True}, {"preserve_norm": True}, {"gate": "snr"}]
UNLIKE += [{"noise_source": "temporal"}]
UNLIKE += [{"noise_source": "temporal", "noise_mean": "raw", "gate_eps": 1e-12}]


@pytest.mark.parametrize("kwargs", UNLIKE, ids=str)
@pytest.mark.parametrize("impl", TORCH)
def test_zero_gradients_move_nothing_without_decay(impl, kwargs):
    """From a fresh state, in which nothing is 0/0; a NaN would be seen here."""
    params = make_params()
    start = [p.detach().clone() for p in params]
    optimizer = temporal(params, **{**kwargs, "weight_decay": 0.0}, **FLAGS[impl])
    for _ in range(3):
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
    for param, before in zip(params, start, strict=True):
        assert torch.equal(param, before)
        assert optimizer.state[param]["step"].item() == 3
        assert not any(optimizer.state[param][key].any() for key in MOMENTS)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in params)


@pytest.mark.parametrize("impl", EVERY)
def test_no_gradients_move_nothing_at_all(impl):
    """Weight decay included: a parameter without a gradient takes no part."""
    params = make_params()
    optimizer = PopRiskAdamW(params, weight_decay=0.5, **FLAGS[impl])
    optimizer.step()
    assert not optimizer.state
    for row in gradients(3):
        feed(params, row)
        optimizer.step()
    before = snapshot(optimizer)
    optimizer.zero_grad(set_to_none=True)
    optimizer.step()
    assert unchanged(optimizer, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kwargs", UNLIKE, ids=str)
@pytest.mark.parametrize("impl", TORCH)
def test_lr_zero_is_inert(impl, kwargs, dtype):
    """No decay, no rounding, whatever the gradient; the moments go on (checkpoint templates)."""
    params = make_params(dtype)
    start = [p.detach().clone() for p in params]
    optimizer = PopRiskAdamW(params, **{**kwargs, "weight_decay": 0.5, "lr": 0.0}, **FLAGS[impl])
    for row in gradients(4, dtype):
        feed(params, row)
        optimizer.step()
    assert all(torch.equal(p, s) for p, s in zip(params, start, strict=True))
    assert optimizer.state[params[0]]["exp_avg"].any()


@pytest.mark.parametrize("kwargs", UNLIKE, ids=str)
@pytest.mark.parametrize("impl", TORCH)
def test_gradients_are_not_written(impl, kwargs):
    """The `.grad` that a user reads after the step is the one that backward left, the same object
    with the same version."""
    layouts = [
        torch.randn(6, 4).t(),
        torch.randn(1).expand(5),  # one number in memory, five elements
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(()),
    ]
    params = [torch.nn.Parameter(torch.randn(g.shape)) for g in layouts]
    optimizer = PopRiskAdamW(params, **kwargs, **FLAGS[impl])
    for _ in range(3):
        kept = [g.clone(memory_format=torch.preserve_format) for g in layouts]
        for param, grad in zip(params, layouts, strict=True):
            param.grad = grad
        versions = [g._version for g in layouts]
        optimizer.step()
        for param, grad, value in zip(params, layouts, kept, strict=True):
            assert param.grad is grad
            assert torch.equal(grad, value)
        assert [g._version for g in layouts] == versions


@pytest.mark.parametrize("impl", EVERY)
def test_autograd_knows_of_the_step_and_takes_no_part(impl):
    """What a step leaves behind belongs to no graph; a backward pass through parameters that have
    moved is refused, as versions tell."""
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = PopRiskAdamW([param], **FLAGS[impl])
    loss = param.square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    assert param.is_leaf
    assert not any(value.requires_grad for value in optimizer.state[param].values())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", EVERY)
def test_a_non_finite_gradient_leaves_no_trace(impl, dtype):
    """The first step and the last included; the square of 3e38 is not finite."""

    def run(poison):
        params = make_params(dtype)
        optimizer = PopRiskAdamW(params, lr=1e-2, collect_stats_every=1, **FLAGS[impl])
        for step, row in enumerate(gradients(5, dtype)):
            if step in poison:
                feed(params, row)
                params[0].grad[1, 2] = poison[step]
                if step == 0:
                    optimizer.init_state()  # as the step does
                before = snapshot(optimizer)
                optimizer.step()
                assert unchanged(optimizer, before)
            feed(params, row)
            optimizer.step()
        return params, optimizer

    clean, _ = run({})
    skipped, optimizer = run({0: float("nan"), 2: float("inf"), 4: 3e38})
    assert all(torch.equal(a, b) for a, b in zip(clean, skipped, strict=True))
    assert optimizer.skipped_nonfinite == 3
    assert float(optimizer.gate_stats()["skipped_nonfinite"]) == 3


@pytest.mark.parametrize("impl", TORCH)
def test_a_skipped_step_leaves_codes_as_they_are(impl):
    param = torch.nn.Parameter(torch.randn(64, 100))
    optimizer = PopRiskAdamW([param], state_dtype="8bit", **FLAGS[impl])
    for fill in (1.0, 2.0, torch.nan):
        before = {k: v.clone() for k, v in optimizer.state[param].items()}
        param.grad = torch.full_like(param, fill)
        optimizer.step()
    assert "exp_avg_codes" in before
    assert all(torch.equal(optimizer.state[param][name], v) for name, v in before.items())
    assert optimizer.skipped_nonfinite == 1


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


@pytest.mark.parametrize("options", [{}, {"preserve_norm": True}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_host_sync_in_step(dtype, options):
    """On an accelerator's path nothing is read back: the same code on the meta device shows it."""
    params = [torch.nn.Parameter(torch.empty(4, 3, dtype=dtype, device="meta")) for _ in range(2)]
    optimizer = PopRiskAdamW(params, lr=1e-2, collect_stats_every=1, **options)
    assert optimizer.path == "capturable"
    for _ in range(3):
        for param in params:
            param.grad = torch.empty_like(param)
        optimizer.step()  # .item(), bool() or float() of a meta tensor would raise
    with pytest.raises(RuntimeError, match="meta"):
        _ = optimizer.state[params[0]]["step"].item()


class Calls(TorchDispatchMode):
    """Number of operators, and the largest sum of what they made and somebody still holds."""

    def __init__(self, known):
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in known}
        self.live = {}
        self.peak = self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count += not any(word in str(func) for word in ("view", "detach", "unbind", "expand"))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self.known:
                    self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.live = {key: pair for key, pair in self.live.items() if not pair[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


def gated_step(impl, count, size=5000, **kwargs):
    params = [torch.nn.Parameter(torch.ones(size)) for _ in range(count)]
    optimizer = PopRiskAdamW(params, **FLAGS[impl], **kwargs)
    for _ in range(2):  # the second step is the first that is gated
        for param in params:
            param.grad = torch.ones(size)
        known = [*params, *(p.grad for p in params)]
        for param in params:
            known.extend(optimizer.state[param].values())
        with Calls(known) as calls:
            optimizer.step()
    return calls.peak / (4 * size), calls.count, params


@pytest.mark.parametrize("kwargs", [{}, {"preserve_norm": True}, {"gate": "snr"}], ids=str)
def test_one_tensor_at_a_time_needs_few_tensors(kwargs):
    """Temporaries of one tensor, however many there are."""
    tensors, _, _ = gated_step("single_tensor", 12, **kwargs)
    assert 2 <= tensors < 12


@pytest.mark.parametrize("kwargs", [{}, {"preserve_norm": True}, {"gate": "snr"}], ids=str)
@pytest.mark.parametrize("impl", ["foreach", "capturable"])
def test_temporaries_are_bounded_by_the_chunk_and_not_by_the_model(impl, kwargs, monkeypatch):
    """A whole copy of the model per operator is what large models cannot pay."""
    whole, _, together = gated_step(impl, 12, **kwargs)
    assert whole > 2 * 12  # the measure sees the copies of an unbounded call
    monkeypatch.setattr(_work, "CHUNK_NUMEL", 2 * 5000)
    bounded, _, in_chunks = gated_step(impl, 12, **kwargs)
    assert bounded < 18 * 2
    assert all(torch.equal(a, b) for a, b in zip(together, in_chunks, strict=True))


@pytest.mark.parametrize("kwargs", [{}, {"preserve_norm": True}], ids=str)
@pytest.mark.parametrize("state_dtype", [None, "bfloat16"])
def test_the_device_path_has_no_loop_over_parameters(state_dtype, kwargs):
    """As many launches for forty tensors of a shape as for four."""
    few, many = (
        gated_step("capturable", count, state_dtype=state_dtype, **kwargs)[1] for count in (4, 40)
    )
    assert many == few
    assert gated_step("single_tensor", 40, **kwargs)[1] > 3 * many


@pytest.mark.parametrize("impl", [pytest.param(i, marks=needs_cuda) for i in ("capturable", None)])
def test_peak_on_cuda(impl):
    params = [torch.nn.Parameter(torch.ones(1 << 20, device="cuda")) for _ in range(12)]
    optimizer = PopRiskAdamW(params, **({"fused": False} if impl else {}))
    for _ in range(3):
        for param in params:
            param.grad = torch.ones_like(param)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        optimizer.step()
        peak = torch.cuda.max_memory_allocated() - before
    chunk = _work.CHUNK_NUMEL if impl else 1 << 20
    assert peak < 4 * chunk * 16  # bytes of a few tensors


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("impl", EAGER)
def test_a_sparse_gradient_changes_nothing(impl, groups):
    """Also where the dense parameters of earlier groups were already looked at."""
    dense, table = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3, 2))
    given = [dense, table] if groups == 1 else [{"params": [dense]}, {"params": [table]}]
    optimizer = PopRiskAdamW(given, **FLAGS[impl])
    before = snapshot(optimizer)
    dense.grad = torch.ones(3)
    torch.nn.functional.embedding(torch.tensor([1]), table, sparse=True).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert unchanged(optimizer, before)
    assert not optimizer.state

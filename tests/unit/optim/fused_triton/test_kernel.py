"""The Triton kernel, run by Triton's interpreter on the CPU, against the single-tensor path."""

import itertools

import pytest
import torch

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.optim import _fused_triton as fused
from poprisk_integrations.optim import _triton_tables as tables
from poprisk_integrations.optim._moments import MOMENTS
from poprisk_integrations.optim._options import resolve_group
from poprisk_integrations.optim._rounding import global_index
from poprisk_integrations.optim._work import GroupWork
from tests.unit.optim.fused_triton.problem import (
    BF16,
    FP32,
    check,
    compare,
    copy,
    everything,
    fused_step,
    make,
    params_of,
    set_grads,
)

pytest.importorskip("triton", reason="triton is not installed: the fused kernel is not tested")

OPTIONS = [
    {},
    {"maximize": True},
    {"gate_decay": True},
    {"gate_warmup": 3},
    {"gate_blend": 0.6},
    {"gate_blend": 0.0},
    {"gate_eps": 1e-3, "gate_decay": True, "gate_blend": 0.5},
    {"noise_mean": "raw"},
    {"betas": (0.3, 0.9), "rho": 0.5},
    {"betas": (0.0, 0.9), "weight_decay": 0.0, "eps": 1e-3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("gate", ["soft", "hard", "snr"])
def test_equals_single_tensor(gate, options):
    check(4, gate=gate, **options)


def test_equals_single_tensor_without_a_gate():
    check(3, gate="none", maximize=True, gate_decay=True)


def test_published_rule():
    check(4, cls=PopRiskAdamW.paper)


DTYPES = list(itertools.product([FP32, BF16], repeat=5))


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(x)[6:] for x in d))
def test_dtypes(dtypes):
    """Low-precision values fall on the same side as in the reference: the draws are the same."""
    param, grad, *states = dtypes
    state_dtype = {key: str(dtype)[6:] for key, dtype in zip(MOMENTS, states, strict=True)}
    shapes = ((1025,), (7,))
    check(2, grad, 1e-3, shapes=shapes, dtype=param, state_dtype=state_dtype)


@pytest.mark.parametrize("stochastic", [True, False])
def test_rounding_of_bfloat16(stochastic):
    options = {"dtype": BF16, "state_dtype": "bfloat16", "stochastic_rounding": stochastic}
    check(6, share=1e-3, rounding_seed=7, **options)
    # and the comparison can tell: with another seed a good part of the values differs
    reference, optimizer = make(**options, rounding_seed=7), make(**options, rounding_seed=8)
    for each in (optimizer, reference):
        set_grads(each, 0, BF16)
    reference.step()
    fused_step(optimizer)
    for key in ("param", "exp_avg", "exp_avg_sq"):
        ours, theirs = (everything(o)[f"7.{key}"] for o in (optimizer, reference))
        differ = float((ours != theirs).float().mean())
        assert (differ == 0) if key == "param" and not stochastic else differ > 0.1


@pytest.mark.parametrize("stochastic", [True, False])
def test_a_nan_stays_a_nan_when_rounded(stochastic):
    """The NaN that NVIDIA GPUs give, 0x7FFFFFFF, has no room for a draw."""
    optimizer = make(((64,),), BF16, stochastic_rounding=stochastic)
    (param,) = params_of(optimizer)
    optimizer.state[param]["exp_avg"].view(torch.int32)[:] = 0x7FFFFFFF
    set_grads(optimizer, 0, BF16)
    fused_step(optimizer)
    assert param.isnan().all()


def test_shards_round_like_the_whole(monkeypatch):
    def run(parts):
        results = []
        for low, high in parts:
            optimizer = make(((3000,),), BF16, state_dtype="bfloat16")
            set_grads(optimizer, 0, BF16)
            (whole,) = params_of(optimizer)
            part = torch.nn.Parameter(whole.detach()[low:high])
            part.grad = whole.grad[low:high]
            shard = PopRiskAdamW([part], lr=1e-2, weight_decay=0.1, state_dtype="bfloat16")
            monkeypatch.setattr(tables, "_first_index", lambda _, low=low: low)
            fused_step(shard)
            results.append(everything(shard))
        return results

    (whole,) = run([(0, 3000)])
    shards = run([(0, 1000), (1000, 3000)])
    for key in ("0.param", "0.exp_avg", "0.exp_avg_sq"):
        assert torch.equal(torch.cat([shard[key] for shard in shards]), whole[key])


def test_first_index_of_a_sharded_parameter():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=2, world_size=4)
    try:
        mesh = init_device_mesh("cpu", (4,))
        for placement, supported in ((Shard(0), True), (Replicate(), True), (Shard(1), False)):
            param = distribute_tensor(torch.zeros(11, 6), mesh, [placement])
            optimizer = PopRiskAdamW([torch.nn.Parameter(param)], state_dtype="bfloat16")
            params_of(optimizer)[0].grad = torch.zeros_like(param)
            work = optimizer._gather(0, optimizer.param_groups[0])
            options = resolve_group(optimizer.param_groups[0])
            assert fused.triton_supports(work, 0, options) == supported
            if supported:
                places = global_index(work.owners[0], work.params[0])
                assert tables._first_index(work.owners[0]) == int(places.view(-1)[0])
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("state_dtype", [None, "bfloat16"])
def test_a_skipped_step_leaves_no_trace(state_dtype):
    optimizer = make(dtype=BF16, state_dtype=state_dtype)
    for step in range(4):
        set_grads(optimizer, step, BF16)
        if step == 3:
            optimizer.param_groups[0]["eps"] = 0.0  # 0/0 where there never was a gradient
            params_of(optimizer)[5].grad[::2] = float("nan")
            params_of(optimizer)[7].grad[0] = float("inf")
            before = {name: value.clone() for name, value in everything(optimizer).items()}
        sums = fused_step(optimizer, keep=float(step < 3), collect=True)
    for name, value in everything(optimizer).items():
        assert torch.equal(value, before[name]), name
    assert sums[0] == sum(p.numel() for p in params_of(optimizer))


def test_scaled_gradients_are_unscaled_and_not_written():
    plain, scaled = make(), make()
    for step in range(3):
        set_grads(plain, step)
        set_grads(scaled, step, scale=1024.0)
        grads = [p.grad.clone() for p in params_of(scaled)]
        fused_step(plain)
        fused_step(scaled, grad_scale=1024.0)
        assert all(torch.equal(p.grad, g) for p, g in zip(params_of(scaled), grads, strict=True))
    for a, b in zip(everything(plain).values(), everything(scaled).values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.4, 0.9)])
def test_without_a_gate_it_is_adamw(betas):
    """States within 2 ulp of torch's; parameters as close to the float64 result as torch's are."""
    optimizer = make(gate="none", betas=betas)
    kw = {"lr": 1e-2, "betas": betas, "weight_decay": 0.1, "foreach": False}
    single, double = (
        torch.optim.AdamW(
            [torch.nn.Parameter(p.detach().to(d)) for p in params_of(optimizer)], **kw
        )
        for d in (FP32, torch.float64)
    )
    errors = {"ours": 0.0, "torch": 0.0}
    for step in range(10):
        set_grads(optimizer, step)
        rows = list(zip(params_of(optimizer), params_of(single), params_of(double), strict=True))
        before = [ours.detach().clone() for ours, _, _ in rows]
        for ours, *others in rows:  # every step starts where ours is
            for other, adamw in zip(others, (single, double), strict=True):
                other.data.copy_(ours.data)
                other.grad = ours.grad.to(other.dtype)
                state = {key: optimizer.state[ours][key] for key in ("exp_avg", "exp_avg_sq")}
                adamw.state[other] = {
                    "step": optimizer.state[ours]["step"].clone(),
                    **{key: value.to(other.dtype, copy=True) for key, value in state.items()},
                }
        fused_step(optimizer)
        single.step()
        double.step()
        for (ours, theirs, exact), old in zip(rows, before, strict=True):
            for key in ("exp_avg", "exp_avg_sq"):
                a, b = optimizer.state[ours][key], single.state[theirs][key]
                large = b.abs() if key == "exp_avg_sq" else torch.maximum(b.abs(), ours.grad.abs())
                assert ((a - b).abs() <= 2 * 2**-23 * large).all(), key
            scale = torch.maximum(old.abs(), exact.detach().abs()).double()
            for name, value in (("ours", ours), ("torch", theirs)):
                error = (value.detach() - exact.detach()).abs() / scale
                errors[name] = max([errors[name], *error.flatten().tolist()])
            assert not optimizer.state[ours]["exp_dev_sq"].any()
    assert 0 < errors["ours"] <= 1.25 * errors["torch"], errors


@pytest.mark.parametrize("gate", ["soft", "hard", "snr", "none"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_statistics(gate, dtype):
    options = {"gate": gate, "gate_warmup": 2, "dtype": dtype, "gate_blend": 0.9}
    reference = make(**options, collect_stats_every=1)
    optimizer = make(**options)
    shares = []
    for step in range(4):
        copy(optimizer, reference)
        for each in (optimizer, reference):
            set_grads(each, step, dtype)
        reference.step()
        actual, expected = fused_step(optimizer, collect=True), reference.gate_sums()[0, :8]
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-3)
        shares.append(float(expected[1] / expected[0]))
    if gate == "none":
        assert shares == [1.0] * 4
    else:
        assert shares[0] == 1.0
        assert 0.1 < shares[-1] < 0.9


def test_element_indices_are_64_bit(kernel):
    """The second block of a tensor of which only the part beyond 2^32 elements exists."""
    start, count = 1 << 32, 700
    optimizer = make(((count,),), BF16, state_dtype="bfloat16", gate="soft")
    shifted = make(((count,),), BF16, state_dtype="bfloat16", gate="soft")
    rows, keys = [], []
    original = fused._run

    def catch(plan, kind, row, key, options, *, collect):
        rows.append(row.clone())
        keys.append(key.clone())
        return original(plan, kind, row, key, options, collect=collect)

    for each in (optimizer, shifted):
        set_grads(each, 0, BF16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "_run", catch)
        fused_step(optimizer)
    group = shifted.param_groups[0]
    kind = tables.Kind((BF16,) * 5, is_vector=False)
    tensors = tables.local_tensors(shifted._gather(0, group), 0)
    table = torch.tensor([t.data_ptr() - start * t.element_size() for t in tensors])
    kernel.poprisk_adamw_kernel[(1,)](
        table,
        torch.tensor([start + count, 0, 0]),
        torch.tensor([0, start // kernel.BLOCK], dtype=torch.int32),
        rows[0],
        keys[0],
        torch.zeros(1, kernel.PARTIALS),
        **fused.kernel_constants(kind, resolve_group(group), collect=False),
    )
    # 2^32 more is the same index in 32 bits, so even the draws are the same
    for key in ("param", *MOMENTS):
        assert torch.equal(everything(shifted)[f"0.{key}"], everything(optimizer)[f"0.{key}"])


def test_moved_tensors_are_found(monkeypatch):
    """Tables are renewed, and never overwritten: a captured graph may read the old one."""
    uploads = []
    # positions, then layout, blocks and addresses of two launches; later addresses only
    expected = [7, 0, 2, 2]
    monkeypatch.setattr(tables, "_upload", lambda host, device: uploads.append(host) or host)
    reference, optimizer = make(), make()
    kept = []
    for step in range(4):
        copy(optimizer, reference)
        set_grads(reference, step)
        if step == 1:
            for param, other in zip(params_of(optimizer), params_of(reference), strict=True):
                param.grad.copy_(other.grad)
        else:
            set_grads(optimizer, step)
            kept += [param.grad for param in params_of(optimizer)]  # no address comes back
        if step == 3:
            params_of(optimizer)[5].data = params_of(optimizer)[5].detach().clone()
        before = len(uploads)
        plans = [(plan, plan.table.clone()) for plan in tables._PLANS.values()]
        reference.step()
        fused_step(optimizer)
        compare(optimizer, reference)
        assert len(uploads) - before == expected[step]
        assert all(torch.equal(plan.table, table) for plan, table in plans)
    assert len(tables._PLANS) == 2  # odd sizes apart


def test_nothing_to_do():
    options = resolve_group(make().param_groups[0])
    fused.triton_poprisk_adamw(GroupWork(), options, None, torch.tensor(1.0), None)
    optimizer = make(((0,), (3, 0)))
    set_grads(optimizer, 0)
    fused_step(optimizer)
    assert [optimizer.state[p]["step"].item() for p in params_of(optimizer)] == [1.0, 1.0]
    assert not tables._PLANS

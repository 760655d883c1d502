"""The Triton kernel, run by Triton's interpreter on the CPU, against the single-tensor path."""

import itertools

import pytest
import torch

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.optim import _triton
from poprisk_integrations.optim._options import MOMENTS, resolve_group
from poprisk_integrations.optim._rounding import first_index, global_index
from tests.unit.optim import paths

pytest.importorskip("triton", reason="triton is not installed: the fused kernel is not tested")

FP32, BF16 = torch.float32, torch.bfloat16
# empty, 0-dim, single, odd, a block less one element, several blocks
SHAPES = ((0, 4), (), (1,), (3,), (5, 7), (1023,), (1024,), (3, 700))
EAGER = {"foreach": False, "fused": False}
KERNEL = {"capturable": True}


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    paths.interpret(monkeypatch)


def make(shapes=SHAPES, dtype=FP32, cls=PopRiskAdamW, **options):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]
    for param in params:
        param.grad_dtype = None  # FSDP may reduce gradients in another dtype
    defaults = {"lr": 1e-2, "weight_decay": 0.1, "noise_source": "temporal"}
    optimizer = cls(params, **{**defaults, **options})
    optimizer.init_state()
    return optimizer


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def everything(optimizer):
    """All tensors of an optimizer by name."""
    named = {}
    for i, param in enumerate(params_of(optimizer)):
        named[f"{i}.param"] = param.detach()
        named |= {f"{i}.{key}": value for key, value in optimizer.state[param].items()}
    return named


def set_grads(optimizer, step, dtype=FP32, scale=1.0):
    generator = torch.Generator().manual_seed(100 + step)
    for param in params_of(optimizer):
        grad = torch.randn(param.shape, generator=generator) + 0.3
        if grad.numel() > 2:
            grad.view(-1)[::3] = 0.0  # coordinates that never have a gradient
        param.grad = torch.empty_like(param, dtype=dtype).copy_(grad * scale)


def compare(optimizer, reference, share=0.0):
    """Equal up to float32 rounding; `share` of bfloat16 values may fall on the other neighbour."""
    # a mean near zero, a small deviation and an update just beyond the boundary are differences
    # of nearly equal numbers; gradients are about 1 here
    lr = float(reference.param_groups[0]["lr"])
    small = {"param": 2e-5 * lr, "exp_avg": 1e-7, "exp_dev_sq": 1e-8}
    ours, theirs = everything(optimizer), everything(reference)
    for name, expected in theirs.items():
        actual = ours[name]
        assert actual.dtype == expected.dtype
        is_low = expected.dtype == BF16
        if is_low:
            assert float((actual != expected).float().sum()) <= share * expected.numel(), name
        torch.testing.assert_close(
            actual,
            expected,
            rtol=2**-7 if is_low else 1e-6,
            atol=small.get(name.partition(".")[2], 0.0),
            msg=lambda text, name=name: f"{name}: {text}",
        )


def check(steps, grad_dtype=None, share=0.0, **options):
    """Each step of the kernel starts where the reference is, so that errors do not add up."""
    reference, optimizer = make(**options, **EAGER), make(**options, **KERNEL)
    for step in range(steps):
        for a, b in zip(
            everything(optimizer).values(), everything(reference).values(), strict=True
        ):
            a.copy_(b)
        for each in (optimizer, reference):
            set_grads(each, step, grad_dtype or options.get("dtype", FP32))
        reference.step()
        assert not paths.launches
        optimizer.step()
        assert paths.launches
        paths.launches.clear()
        compare(optimizer, reference, share)
        actual, expected = optimizer.gate_sums(), reference.gate_sums()
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-3)
    return reference


OPTIONS = [
    {"maximize": True, "gate_decay": True},
    {"gate_warmup": 2},
    {"gate_blend": 0.0},
    {"gate_eps": 1e-3, "noise_mean": "raw", "gate_decay": True, "gate_blend": 0.5},
    {"noise_mean": "raw", "gate_eps": 0.0},
    {"betas": (0.3, 0.9), "rho": 0.5},
    {"betas": (0.0, 0.9), "weight_decay": 0.0, "eps": 1e-3},
]
CASES = [{"gate": g, **o} for g, o in zip(itertools.cycle(["soft", "hard", "snr"]), OPTIONS)]


@pytest.mark.parametrize(
    "options",
    [*CASES, {}, {"gate": "none", "maximize": True}, {"cls": PopRiskAdamW.paper}],
    ids=str,
)
def test_equals_single_tensor(options):
    check(3, **options)


@pytest.mark.parametrize("gate", ["soft", "hard", "snr", "none"])
def test_statistics(gate):
    optimizer = check(3, gate=gate, gate_blend=0.9, dtype=BF16, collect_stats_every=1, share=1e-3)
    open_fraction = float(optimizer.gate_stats()["open_fraction"])
    assert open_fraction == 1.0 if gate == "none" else 0.1 < open_fraction < 0.9


@pytest.mark.parametrize("low", ["p", "g", "m", "v", "s", "gs", "pgmvs"])
def test_dtypes(low):
    """Low-precision values fall on the same side as in the reference: the draws are the same."""
    param, grad, *states = (BF16 if name in low else FP32 for name in "pgmvs")
    state_dtype = {key: str(dtype)[6:] for key, dtype in zip(MOMENTS, states, strict=True)}
    check(2, grad, 1e-3, shapes=((1025,), (7,)), dtype=param, state_dtype=state_dtype)


@pytest.mark.parametrize("stochastic", [True, False])
def test_rounding_of_bfloat16(stochastic):
    options = {"dtype": BF16, "state_dtype": "bfloat16", "stochastic_rounding": stochastic}
    check(3, share=1e-3, rounding_seed=7, **options)
    # and the comparison can tell: with another seed a good part of the values differs
    runs = [make(**options, rounding_seed=seed, **KERNEL) for seed in (7, 8)]
    for each in runs:
        set_grads(each, 0, BF16)
        each.step()
    for key in ("param", "exp_avg", "exp_avg_sq"):
        ours, theirs = (everything(o)[f"7.{key}"] for o in runs)
        differ = float((ours != theirs).float().mean())
        assert (differ == 0) if key == "param" and not stochastic else differ > 0.1


@pytest.mark.parametrize("stochastic", [True, False])
def test_a_nan_stays_a_nan_when_rounded(stochastic):
    """The NaN that NVIDIA GPUs give, 0x7FFFFFFF, has no room for a draw."""
    optimizer = make(((64,),), BF16, stochastic_rounding=stochastic, **KERNEL)
    (param,) = params_of(optimizer)
    optimizer.state[param]["exp_avg"].view(torch.int32)[:] = 0x7FFFFFFF
    set_grads(optimizer, 0, BF16)
    optimizer.step()
    assert param.isnan().all()


@pytest.mark.parametrize("state_dtype", [None, "bfloat16"])
def test_a_skipped_step_leaves_no_trace(state_dtype):
    optimizer = make(dtype=BF16, state_dtype=state_dtype, collect_stats_every=1, **KERNEL)
    for step in range(3):
        set_grads(optimizer, step, BF16)
        if step == 2:
            optimizer.param_groups[0]["eps"] = 0.0  # 0/0 where there never was a gradient
            params_of(optimizer)[5].grad[::2] = float("nan")
            params_of(optimizer)[7].grad[0] = float("inf")
            before = {name: value.clone() for name, value in everything(optimizer).items()}
        optimizer.step()
    for name, value in everything(optimizer).items():
        assert torch.equal(value, before[name]), name
    assert optimizer.gate_sums()[0, 0] == sum(p.numel() for p in params_of(optimizer))


def test_scaled_gradients_are_unscaled_and_not_written():
    plain, scaled = make(**KERNEL), make(**KERNEL)
    scaled.grad_scale, scaled.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    for step in range(2):
        set_grads(plain, step)
        set_grads(scaled, step, scale=1024.0)
        grads = [p.grad.clone() for p in params_of(scaled)]
        plain.step()
        scaled.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(params_of(scaled), grads, strict=True))
    for a, b in zip(everything(plain).values(), everything(scaled).values(), strict=True):
        assert torch.equal(a, b)


def test_shards_round_like_the_whole(monkeypatch):
    def run(parts):
        results = []
        for low, high in parts:
            optimizer = make(((3000,),), BF16, state_dtype="bfloat16")
            set_grads(optimizer, 0, BF16)
            (whole,) = params_of(optimizer)
            part = torch.nn.Parameter(whole.detach()[low:high])
            part.grad = whole.grad[low:high]
            options = {"lr": 1e-2, "weight_decay": 0.1, "state_dtype": "bfloat16"}
            shard = PopRiskAdamW([part], **options, **KERNEL)
            monkeypatch.setattr(_triton, "first_index", lambda _, low=low: low)
            shard.step()
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
            assert _triton.supports(work, 0, options) == supported
            if supported:
                places = global_index(work.owners[0], work.params[0])
                assert first_index(work.owners[0]) == int(places.view(-1)[0])
    finally:
        torch.distributed.destroy_process_group()


def test_element_indices_are_64_bit():
    """The second block of a tensor of which only the part beyond 2^32 elements exists."""
    start, count = 1 << 32, 700
    kernel = paths.interpreted_kernel()
    optimizer, shifted = (
        make(((count,),), BF16, state_dtype="bfloat16", **KERNEL) for _ in range(2)
    )
    arguments = []
    run = _triton._run

    def catch(plan, kind, row, key, options, *, collect):
        arguments.extend((row.clone(), key.clone()))
        return run(plan, kind, row, key, options, collect=collect)

    for each in (optimizer, shifted):
        set_grads(each, 0, BF16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_triton, "_run", catch)
        optimizer.step()
    group = shifted.param_groups[0]
    kind = _triton.Kind((BF16,) * 5, is_vector=False)
    tensors = _triton._tensors_of(shifted._gather(0, group), 0)
    kernel.poprisk_adamw_kernel[(1,)](
        torch.tensor([t.data_ptr() - start * t.element_size() for t in tensors]),
        torch.tensor([start + count, 0, 0]),
        torch.tensor([0, start // kernel.BLOCK], dtype=torch.int32),
        *arguments,
        torch.zeros(1, kernel.PARTIALS),
        **_triton.kernel_constants(kind, resolve_group(group), collect=False),
    )
    # 2^32 more is the same index in 32 bits, so even the draws are the same
    for key in ("param", *MOMENTS):
        assert torch.equal(everything(shifted)[f"0.{key}"], everything(optimizer)[f"0.{key}"])


def test_moved_tensors_are_found(monkeypatch):
    """Tables are renewed, and never overwritten: a captured graph may read the old one."""
    uploads, used = [], []
    monkeypatch.setattr(_triton, "upload", lambda host, device: uploads.append(host) or host)
    run = _triton._run

    def noted(tables, *args, **kwargs):
        used.append((tables.table, tables.table.clone()))
        return run(tables, *args, **kwargs)

    monkeypatch.setattr(_triton, "_run", noted)
    reference, optimizer = make(**EAGER), make(**KERNEL)
    # layout, blocks and addresses of two launches, odd sizes apart; later addresses only
    expected, kept = [6, 0, 2, 2], []
    for step in range(4):
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
        reference.step()
        optimizer.step()
        assert len(uploads) - before == expected[step]
    assert all(torch.equal(table, as_it_was) for table, as_it_was in used)
    for a, b in zip(params_of(optimizer), params_of(reference), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


def _transpose(param):
    param.data = param.data.t().contiguous().t()


def _transpose_grad(param):
    param.grad = param.grad.t().contiguous().t()


def _with_gaps(param):
    param.grad = param.grad.repeat_interleave(2, dim=1)[:, ::2]


@pytest.mark.parametrize(
    ("is_taken", "options", "change"),
    [
        (True, {}, None),
        (True, {"dtype": BF16, "state_dtype": "bfloat16"}, None),
        (True, {"preserve_norm": True, "gate": "none"}, None),
        (False, {"preserve_norm": True}, None),
        (False, {"dtype": torch.float64}, None),
        (False, {"dtype": torch.complex64}, None),
        (False, {"state_dtype": "8bit"}, None),
        (False, {"state_dtype": {"exp_dev_sq": "8bit"}}, None),
        (False, {}, _transpose_grad),
        (False, {}, _with_gaps),
        (False, {}, _transpose),  # the states were created before
    ],
)
def test_what_is_left_to_the_other_path(is_taken, options, change):
    optimizer = make(((64, 64),), **options)
    set_grads(optimizer, 0, options.get("dtype", FP32))
    (param,) = params_of(optimizer)
    if change is not None:
        change(param)
    work = optimizer._gather(0, optimizer.param_groups[0])
    assert _triton.supports(work, 0, resolve_group(optimizer.param_groups[0])) == is_taken


@pytest.mark.parametrize(
    "layout",
    [
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: t.transpose(0, 3).contiguous().transpose(0, 3),
        lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),  # not 16-byte aligned
    ],
    ids=["channels_last", "transposed", "misaligned"],
)
def test_layouts(layout):
    base = layout(torch.randn(4, 3, 6, 20))
    reference, optimizer = (
        PopRiskAdamW([torch.nn.Parameter(base.clone())], lr=1e-2, **flags)
        for flags in (EAGER, KERNEL)
    )
    for step in range(3):
        for each in (reference, optimizer):
            set_grads(each, step)
            each.step()
    assert paths.launches
    compare(optimizer, reference)


XPU = torch.device("xpu")  # asked for nothing but its type


def _raise(*args, **kwargs):
    raise RuntimeError("no compiler")


def _do_nothing(*args, **kwargs):
    return torch.zeros(1, 5)


@pytest.mark.parametrize(
    ("broken", "reason"), [(_raise, "RuntimeError: no compiler"), (_do_nothing, "differs")]
)
def test_a_probe_tells_whether_the_kernel_works_once(monkeypatch, broken, reason):
    probe = _triton._probe
    monkeypatch.setattr(_triton, "_probe", lambda device: probe(torch.device("cpu")))
    assert _triton.triton_is_usable(XPU)
    monkeypatch.setattr(_triton, "_run", broken)
    assert _triton.triton_is_usable(XPU)
    _triton._USABLE.clear()
    with pytest.warns(UserWarning, match=reason):
        assert not _triton.triton_is_usable(XPU)
    assert not _triton.triton_is_usable(XPU)

"""What the kernel takes and what it leaves to the other path; the probe."""

import subprocess
import sys

import pytest
import torch

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.optim import _fused_triton as fused
from poprisk_integrations.optim import poprisk_adamw
from poprisk_integrations.optim._options import resolve_group
from tests.unit.optim.fused_triton.problem import (
    BF16,
    CPU,
    FP32,
    compare,
    everything,
    fused_step,
    make,
    params_of,
    set_grads,
)

pytest.importorskip("triton", reason="triton is not installed: the fused kernel is not tested")


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
    def build():
        param = layout(torch.randn(4, 3, 6, 20, generator=torch.Generator().manual_seed(3)))
        return PopRiskAdamW([torch.nn.Parameter(param)], lr=1e-2, foreach=False)

    reference, optimizer = build(), build()
    for step in range(3):
        for each in (reference, optimizer):
            set_grads(each, step)
        reference.step()
        fused_step(optimizer)
    compare(optimizer, reference)


def _supports(dtype=FP32, change=lambda p: None, shape=(64, 64), **options):
    optimizer = make((shape,), dtype, **options)
    set_grads(optimizer, 0, dtype)
    change(params_of(optimizer)[0])
    work = optimizer._gather(0, optimizer.param_groups[0])
    return fused.triton_supports(work, 0, resolve_group(optimizer.param_groups[0]))


def _transpose(param):
    param.data = param.data.t().contiguous().t()


def _transpose_grad(param):
    param.grad = param.grad.t().contiguous().t()


def _with_gaps(param):
    param.grad = param.grad.repeat_interleave(2, dim=1)[:, ::2]


def test_what_is_left_to_the_other_path():
    assert _supports()
    assert _supports(BF16, state_dtype="bfloat16")
    assert not _supports(torch.float64)
    assert not _supports(state_dtype="8bit")
    assert not _supports(state_dtype={"exp_dev_sq": "8bit"})
    assert not _supports(preserve_norm=True)
    assert _supports(preserve_norm=True, gate="none")
    assert not _supports(change=_transpose_grad)
    assert not _supports(change=_with_gaps)
    assert not _supports(change=_transpose)  # the states were created before

    def transposed(**options):
        param = torch.nn.Parameter(torch.randn(8, 6).t())
        param.grad = torch.randn(8, 6).t()
        optimizer = PopRiskAdamW([param], **options)
        work = optimizer._gather(0, optimizer.param_groups[0])
        return fused.triton_supports(work, 0, resolve_group(optimizer.param_groups[0]))

    assert transposed()
    assert not transposed(state_dtype={"exp_dev_sq": "bfloat16"})

    complex_ = torch.nn.Parameter(torch.zeros(4, dtype=torch.complex64))
    complex_.grad = torch.zeros_like(complex_)
    optimizer = PopRiskAdamW([complex_])
    work = optimizer._gather(0, optimizer.param_groups[0])
    assert not fused.triton_supports(work, 0, resolve_group(optimizer.param_groups[0]))


def test_a_compiled_step_is_the_step(monkeypatch):
    """Dynamo does not look into the launch, and the states that a step makes stay."""
    monkeypatch.setattr(poprisk_adamw, "path_of", lambda group: "fused_triton")
    runs = []
    for wrap in (torch.compile(backend="eager"), lambda step: step):
        torch._dynamo.reset()
        param = torch.nn.Parameter(torch.linspace(-1, 1, 300))
        optimizer = PopRiskAdamW([param], lr=1e-2, capturable=True)
        step = wrap(optimizer.step)
        for index in range(4):
            set_grads(optimizer, index)
            with torch._dynamo.config.patch(error_on_recompile=True):
                step()
        runs.append(optimizer)
    compiled, plain = map(everything, runs)
    assert plain["0.step"] == 4
    assert all(torch.equal(compiled[name], value) for name, value in plain.items())


def test_probe_says_yes():
    assert fused.triton_is_usable(CPU)


def _raise(*args, **kwargs):
    raise RuntimeError("no compiler")


def _do_nothing(plan, *args, **kwargs):
    return torch.zeros(1, 5)


@pytest.mark.parametrize(
    ("broken", "reason"), [(_raise, "RuntimeError: no compiler"), (_do_nothing, "differs")]
)
def test_probe_says_no_once(monkeypatch, broken, reason):
    monkeypatch.setattr(fused, "_run", broken)
    with pytest.warns(UserWarning, match=reason):
        assert not fused.triton_is_usable(CPU)
    assert not fused.triton_is_usable(CPU)


def test_cpu_is_not_usable_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(fused, "_is_interpreted", lambda: False)
    assert not fused.triton_is_usable(CPU)


def test_triton_is_imported_late():
    code = (
        "import sys; import poprisk_integrations.optim._fused_triton; sys.exit('triton' in "
        "sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=100).returncode == 0

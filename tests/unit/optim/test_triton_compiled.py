"""The Triton kernel, compiled: ahead of time without a device, and run where there is one."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.optim import _triton
from poprisk_integrations.optim._options import resolve_group
from tests.helpers.optim_problem import temporal
from tests.unit.optim.paths import needs_cuda

triton = pytest.importorskip("triton", reason="triton is not installed: no kernel is compiled")

FP32, BF16 = torch.float32, torch.bfloat16
DTYPES = {
    "float32": (FP32,) * 5,
    "noise-bfloat16": (FP32, FP32, FP32, FP32, BF16),
    "params-bfloat16": (BF16, BF16, FP32, FP32, FP32),
    "all-bfloat16": (BF16,) * 5,
}
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}


def options_of(**options):
    return resolve_group(temporal([torch.nn.Parameter(torch.zeros(1))], **options).param_groups[0])


def compile_for(target, kind, tmp_path, monkeypatch, collect=False, **options):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from poprisk_integrations.optim import _triton_kernel as kernel

    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1: kernels are not compiled")
    constants = _triton.kernel_constants(kind, options_of(**options), collect=collect)
    pointers = {"table": "*i64", "layout": "*i64", "blocks": "*i32"}
    pointers |= {"rows": "*fp32", "keys": "*i32", "partials": "*fp32"}
    source = ASTSource(
        fn=kernel.poprisk_adamw_kernel,
        signature={**pointers, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in range(len(pointers))},
    )
    settings = {"num_warps": 4 if kind.is_vector else 8, "enable_fp_fusion": False}
    with monkeypatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=settings)


def resources(cubin, tmp_path):
    """Registers per thread, and bytes of stack (spilled registers) per thread."""
    (tmp_path / "kernel.cubin").write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [tool, "--dump-resource-usage", tmp_path / "kernel.cubin"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK")]


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_compiles(target, dtypes, tmp_path, monkeypatch):
    kind = _triton.Kind(dtypes, is_vector=True)
    compiled = compile_for(target, kind, tmp_path, monkeypatch)
    if target == "gfx942":
        assert re.search(r"vgpr_spill_count:\s*0\b", compiled.asm["amdgcn"])
        return
    ptx = compiled.asm["ptx"]
    registers, stack = resources(compiled.asm["cubin"], tmp_path)
    assert stack == 0
    assert registers <= 96  # five programs of 128 threads per multiprocessor
    # 16 bytes at once; 8 elements per thread and tensor
    sizes = [8 * dtype.itemsize // 16 for dtype in dtypes]
    assert ptx.count("ld.global.v4") == sum(sizes)
    assert ptx.count("st.global.v4") == sum(sizes) - sizes[1]
    # squares of small gradients are denormal, and rounding is that of the other paths
    assert "ftz" not in ptx
    assert "approx" not in ptx
    assert "fma.rn.f32" not in ptx


@pytest.mark.parametrize("is_vector", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"gate": "hard", "collect": True},
        {"gate": "snr", "collect": True},
        {"gate": "none", "collect": True},
        {"collect": True},
        {"gate_eps": 1e-12, "noise_mean": "raw", "gate_decay": True, "maximize": True},
        {"stochastic_rounding": False},
        {"noise_source": "moments", "collect": True},
    ],
    ids=str,
)
def test_every_variant_compiles(options, is_vector, tmp_path, monkeypatch):
    kind = _triton.Kind(DTYPES["params-bfloat16"], is_vector)
    compiled = compile_for("sm_90", kind, tmp_path, monkeypatch, **options)
    assert resources(compiled.asm["cubin"], tmp_path)[1] == 0


def make(dtype, state_dtype, **options):
    generator = torch.Generator().manual_seed(0)
    shapes = ((), (3,), (1023,), (64, 700), (0,), (1 << 20,))
    params = [torch.randn(s, generator=generator).to("cuda", dtype) for s in shapes]
    fixed = {"lr": 1e-2, "weight_decay": 0.1, "noise_source": "temporal"}
    options = {**fixed, "state_dtype": state_dtype, **options}
    optimizer = PopRiskAdamW([torch.nn.Parameter(p) for p in params], **options)
    optimizer.init_state()
    return optimizer


def set_grads(optimizer, number):
    generator = torch.Generator().manual_seed(100 + number)
    for param in optimizer.param_groups[0]["params"]:
        grad = torch.randn(param.shape, generator=generator) + 0.3
        param.grad = grad.to(param.device, param.dtype)


def tensors(optimizer):
    for param in optimizer.param_groups[0]["params"]:
        yield from (param.detach(), *optimizer.state[param].values())


CUDA = pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_cuda)])


@CUDA
@pytest.mark.parametrize("state_dtype", [None, "bfloat16", {"exp_dev_sq": "bfloat16"}], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("gate", ["soft", "hard", "snr", "none"])
def test_on_cuda_it_equals_the_capturable_path(device, gate, dtype, state_dtype):
    options = {"gate": gate, "collect_stats_every": 1}
    ours, theirs = (
        make(dtype, state_dtype, **options),
        make(dtype, state_dtype, fused=False, **options),
    )
    assert (ours.path, theirs.path) == ("fused_triton", "capturable")
    for number in range(4):
        for a, b in zip(tensors(ours), tensors(theirs), strict=True):
            a.copy_(b)
        for optimizer in (ours, theirs):
            set_grads(optimizer, number)
            optimizer.step()
        for a, b in zip(tensors(ours), tensors(theirs), strict=True):
            is_low = b.dtype == BF16
            torch.testing.assert_close(a, b, rtol=2**-7 if is_low else 1e-5, atol=1e-6)
            if is_low and b.numel():
                assert float((a != b).float().mean()) <= 1e-3 + 1 / b.numel()
        torch.testing.assert_close(ours.gate_sums(), theirs.gate_sums(), rtol=1e-4, atol=1.0)


@CUDA
def test_a_captured_step_replays_after_the_tables_have_changed(device):
    ours, theirs = make(FP32, None), make(FP32, None)
    for optimizer in (ours, theirs):
        set_grads(optimizer, 0)
        optimizer.step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.step()
    for number in range(1, 4):
        other = make(FP32, None)  # the same sizes elsewhere
        set_grads(other, number)
        other.step()
        graph.replay()
        theirs.step()
    for a, b in zip(tensors(ours), tensors(theirs), strict=True):
        assert torch.equal(a, b)

"""The implementations that tests run on, and what stands in for a compiler and for a device.

A test with the parameter `impl` gets the stand-ins of that implementation from `conftest.py`.
"""

import functools
import importlib
import sys

import numpy as np
import pytest
import torch

import poprisk_integrations.optim as package
from poprisk_integrations.optim import _cpu_build, _paths, _triton, poprisk_adamw

__all__ = ["EAGER", "EVERY", "FLAGS", "HOST", "TORCH", "launches", "needs_compiler", "needs_cuda"]

# `fused=False` also where it is the default now: what None picks may depend on the machine.
FLAGS = {
    "single_tensor": {"foreach": False, "fused": False},
    "foreach": {"foreach": True, "fused": False},
    "capturable": {"capturable": True, "fused": False},
    "fused_compiled": {"fused": True},
    "fused_triton": {"capturable": True},  # interpreted on the CPU
}
EVERY = list(FLAGS)
EAGER = EVERY[:3]
HOST = EVERY[:2]
TORCH = EVERY[:4]  # without the interpreter, which is slow
KERNEL = "poprisk_integrations.optim._triton_kernel"

needs_compiler = pytest.mark.skipif(
    not _cpu_build.compiler_is_found(), reason="no C++ compiler: the CPU kernel is not tested"
)
launches = []  # of the interpreted kernel in this test

needs_cuda = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@functools.cache
def interpreted_kernel():
    """A copy of the kernel's module for the interpreter, wherever Triton was imported before.

    Triton looks at the environment when a kernel is decorated, so only that moment needs it.
    """
    compiled = sys.modules.pop(KERNEL, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        module = importlib.import_module(KERNEL)
    # only Triton's own sum is a sum of numpy there, anything else is a loop over elements
    module._add = importlib.import_module("triton.language").standard._sum_combine
    del sys.modules[KERNEL]
    del package._triton_kernel
    if compiled is not None:
        sys.modules[KERNEL] = package._triton_kernel = compiled
    return module


def interpret(patch):
    """Groups on the CPU take the kernel, as they would on a device."""
    pytest.importorskip("triton", reason="triton is not installed: the kernel is not tested")
    module, run, path_of = interpreted_kernel(), _triton._run, _paths.path_of

    def counted(*args, **kwargs):
        launches.append(args)
        with np.errstate(invalid="ignore"):  # numpy reports 0/0
            return run(*args, **kwargs)

    def path(group):
        is_eager = group["preserve_norm"] or group["fused"] is False or not group["params"]
        return path_of(group) if is_eager else "fused_triton"

    patch.setitem(sys.modules, KERNEL, module)
    patch.setattr(package, "_triton_kernel", module, raising=False)
    patch.setattr(_triton, "_run", counted)
    patch.setattr(_triton, "_USABLE", {})
    _triton._tables.cache_clear()
    patch.setattr(_paths, "path_of", path)
    patch.setattr(poprisk_adamw, "path_of", path)

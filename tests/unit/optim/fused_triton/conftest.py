"""The kernel's module, loaded for the interpreter."""

import importlib
import sys

import pytest

import poprisk_integrations.optim as package
from poprisk_integrations.optim import _fused_triton as fused
from poprisk_integrations.optim import _triton_tables as tables
from tests.unit.optim.fused_triton.problem import KERNEL


@pytest.fixture(scope="module", autouse=True)
def kernel():
    """A copy of the kernel's module for the interpreter, wherever Triton was imported before.

    Triton looks at the environment when a kernel is decorated, so only that moment needs it.
    """
    compiled = sys.modules.pop(KERNEL, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        module = importlib.import_module(KERNEL)
    # only Triton's own sum is a sum of numpy there, anything else is a loop over elements
    module._add = importlib.import_module("triton.language").standard._sum_combine
    yield module
    del sys.modules[KERNEL]
    del package._triton_kernel
    if compiled is not None:
        sys.modules[KERNEL] = package._triton_kernel = compiled


@pytest.fixture(autouse=True)
def _no_memory(monkeypatch):
    monkeypatch.setattr(fused, "_USABLE", {})
    for name in ("_PLANS", "_POSITIONS"):
        monkeypatch.setattr(tables, name, type(tables._PLANS)())

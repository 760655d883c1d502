"""Stand-ins for the implementation that a test asks for by its parameter `impl`."""

import pytest

from poprisk_integrations.optim import _cpu_build
from tests.unit.optim import paths


@pytest.fixture(autouse=True)
def _stand_ins(request, monkeypatch):
    paths.launches.clear()
    impl = getattr(getattr(request.node, "callspec", None), "params", {}).get("impl")
    if impl == "fused_compiled" and not _cpu_build.compiler_is_found():
        pytest.skip("no C++ compiler: the CPU kernel is not tested")
    elif impl == "fused_triton":
        paths.interpret(monkeypatch)

"""Stand-ins for the implementation that a test asks for by its parameter `impl`."""

import pytest

from tests.unit.optim import paths


@pytest.fixture(autouse=True)
def _stand_ins(request, monkeypatch):
    paths.launches.clear()
    impl = getattr(getattr(request.node, "callspec", None), "params", {}).get("impl")
    if impl == "fused_compiled":
        paths.uncompile(monkeypatch)
    elif impl == "fused_triton":
        paths.interpret(monkeypatch)

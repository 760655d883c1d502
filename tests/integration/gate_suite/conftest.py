"""The modules of the harness and of one study, without leaving them importable for others."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).parents[3] / "recipes" / "benchmarks"


@contextmanager
def modules(folder: Path, package: str = "") -> Iterator[SimpleNamespace]:
    """The modules of a folder by name."""
    names = sorted(path.stem for path in folder.glob("*.py"))
    full = [package + name for name in names]
    kept = {name: sys.modules.pop(name) for name in full if name in sys.modules}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder.parent if package else folder))
        patch.syspath_prepend(str(BENCHMARKS))
        found = [importlib.import_module(name) for name in full]
        yield SimpleNamespace(**dict(zip(names, found, strict=True)))
    for name in full:
        sys.modules.pop(name, None)
    sys.modules.update(kept)


@pytest.fixture(scope="session")
def harness():
    """`gate_harness`: the same modules for all tests, since the studies import them by name."""
    with modules(BENCHMARKS / "gate_harness", "gate_harness.") as found:
        yield found


@pytest.fixture(scope="module")
def study(request, harness):
    """The modules of `recipes/benchmarks/<STUDY>`, for a test module that names its STUDY."""
    with modules(BENCHMARKS / request.module.STUDY) as found:
        yield found

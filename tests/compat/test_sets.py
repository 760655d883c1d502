"""Every set of versions, installed and tested; the results are written for the README's table."""

import tempfile
from pathlib import Path

import pytest

from tests.compat.environment import build, find_python
from tests.compat.run_set import make_environment, run_set, write_result
from tests.compat.sets import SETS, VersionSet

pytestmark = [pytest.mark.compat, pytest.mark.timeout(7200)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Sdist and wheel."""
    pytest.importorskip("build", reason="build is not installed: pip install -e '.[dev]'")
    return build(tmp_path_factory.mktemp("build") / "files")


@pytest.mark.parametrize("chosen", SETS, ids=lambda chosen: chosen.name)
def test_set(chosen: VersionSet, files: tuple[Path, Path]) -> None:
    python = find_python(chosen.python)
    if python is None:
        pytest.skip(f"no Python {chosen.python} here")
    sdist, wheel = files
    with tempfile.TemporaryDirectory() as folder:  # gigabytes: not kept, unlike tmp_path
        environment = make_environment(chosen, python, wheel, Path(folder))
        result = run_set(chosen, environment, sdist)
    write_result(result)
    assert {name: t["failed"] for name, t in result["tests"].items() if t["failed"]} == {}

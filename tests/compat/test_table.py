"""The README's support table is that of the results, and the results are those of pyproject."""

from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.compat.run_set import FILES
from tests.compat.sets import SETS
from tests.compat.table import README, ROOT, readme_with_table, results, support_table

RESULTS = results()
TESTS = ROOT / "tests"
EXTRAS = ("hf", "lightning", "trl")


def _floors() -> dict[str, Version]:
    """Lowest version that pyproject.toml allows of each package that users' runs need."""
    try:
        import tomllib
    except ImportError:  # Python 3.10
        return {}
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"]]
    texts += [text for extra in EXTRAS for text in project["optional-dependencies"][extra]]
    floors = {}
    for requirement in map(Requirement, texts):
        lowest = [spec.version for spec in requirement.specifier if spec.operator == ">="]
        if lowest:
            floors[requirement.name] = Version(lowest[0])
    return floors


def test_the_readme_has_the_table() -> None:
    text = README.read_text()
    assert text == readme_with_table(text), "run: python -m tests.compat.table"


def test_every_set_was_run() -> None:
    assert [result["set"] for result in RESULTS] == [each.name for each in SETS]
    for result, chosen in zip(RESULTS, SETS, strict=True):
        assert result["pins"] == list(chosen.pins), f"run {chosen.name} again"
        assert result["python"].startswith(chosen.python)


@pytest.mark.parametrize("result", RESULTS, ids=lambda result: result["set"])
def test_nothing_failed(result: dict[str, Any]) -> None:
    assert {name: test["failed"] for name, test in result["tests"].items() if test["failed"]} == {}
    assert result["tests"]["check_optimizer"]["passed"] > 5


@pytest.mark.parametrize(("name", "floor"), _floors().items())
def test_the_lowest_versions_were_tested(name: str, floor: Version) -> None:
    tested = [Version(r["versions"][name]) for r in RESULTS if name in r["versions"]]
    assert min(tested) == floor


def test_each_interface_passed_in_old_and_new() -> None:
    """A file that was skipped as a whole shows nothing."""
    for check in ("check_trainer", "check_lightning", "check_dpo"):
        sets = [r["set"] for r in RESULTS if r["tests"].get(check, {}).get("passed", 0) > 3]
        assert any("floor" in name for name in sets), check
        assert any("newest" in name for name in sets), check


def test_the_tests_that_every_set_runs_are_there() -> None:
    """A name that was left behind would make every set fail to collect it."""
    assert [name for names in FILES.values() for name in names if not (TESTS / name).exists()] == []


def test_a_failure_is_shown() -> None:
    tests = {"check_dpo": {"passed": 3, "failed": {"test_x": "no"}, "skipped": {}}}
    row = {"about": "made up", "python": "3.11", "versions": {"torch": "2.6.0"}, "tests": tests}
    last = support_table([row]).splitlines()[-1]
    assert last == "| made up | 3.11 | 2.6.0 |  |  |  |  |  |  | 3 passed, **1 failed** |"

"""The wheel as it lies in site-packages, and the sdist that these tests came out of."""

import importlib
import json
import os
import pkgutil
import subprocess
import sysconfig
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import poprisk_integrations

PACKAGE = Path(poprisk_integrations.__file__).parent
SITE = Path(sysconfig.get_path("purelib"))
ROOT = Path(__file__).parents[3]
RECIPE = "dpo-noisy-qwen2.5-0.5b"

pytestmark = pytest.mark.skipif(PACKAGE.parent != SITE, reason="not the wheel: an editable install")


def _poprisk(*words: str, cwd: Path) -> str:
    """The console script's output, away from any checkout."""
    script = Path(sysconfig.get_path("scripts")) / "poprisk"
    done = subprocess.run(
        [str(script), *words],
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_module_is_imported() -> None:
    """All that the extras here suffice for; nothing of ours may be missing."""
    done, ours_missing = 0, []
    for found in pkgutil.walk_packages([str(PACKAGE)], "poprisk_integrations.", lambda _: None):
        if found.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(found.name)
            done += 1
        except ImportError as error:
            if (error.name or "").startswith("poprisk_integrations"):
                ours_missing.append(found.name)
    assert ours_missing == []
    assert done > 50


def test_types_and_cards_are_in_the_wheel() -> None:
    files = {str(path) for path in distribution("poprisk_integrations").files or []}
    assert "poprisk_integrations/py.typed" in files
    assert {f"poprisk_integrations/{n}/README.md" for n in ("core", "optim", "trl")} <= files
    assert "poprisk_integrations/optim/_cpu_kernel.cpp" in files  # compiled where it is used
    assert any(name.endswith("licenses/LICENSE") for name in files)
    assert not any(name.startswith(("tests", "recipes")) for name in files)


def test_environment_report(tmp_path: Path) -> None:
    report = json.loads(_poprisk("env", "--json", cwd=tmp_path))
    assert report["packages"]["poprisk_integrations"] == poprisk_integrations.__version__


def test_recipes_are_in_the_wheel(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    rows: list[dict[str, Any]] = json.loads(_poprisk("recipes", "list", "--json", cwd=tmp_path))
    share = Path(sysconfig.get_path("data")) / "share" / "poprisk_integrations" / "recipes"
    assert {Path(row["folder"]).parent for row in rows} == {share}
    described = {path.parent.name for path in (ROOT / "recipes").glob("*/card.yaml")}
    assert {row["name"] for row in rows} == described
    _poprisk("recipes", "copy", RECIPE, cwd=tmp_path)
    assert (tmp_path / RECIPE / "smoke.yaml").is_file()


def test_a_recipe_runs(tmp_path: Path) -> None:
    if find_spec("trl") is None or find_spec("peft") is None:
        pytest.skip("needs trl and peft")
    _poprisk("recipes", "run", "--smoke", RECIPE, cwd=tmp_path)
    assert (tmp_path / "out-smoke" / "model.safetensors").is_file()


def test_the_sdist_holds_what_the_tests_need() -> None:
    if (ROOT / "poprisk_integrations").exists():
        pytest.skip("a checkout")
    for name in (
        "pyproject.toml", "CITATION.cff", "CHANGELOG.md", "LICENSE", "README.md",
        ".ci/constraints.txt", "recipes/benchmarks", "tests/helpers", "tests/conftest.py",
    ):  # fmt: skip
        assert (ROOT / name).exists(), name

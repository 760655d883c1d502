"""Imports go one way: a file imports only from its own layer or a lower one."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "poprisk_integrations"
LAYERS = ["core", "distributed", "optim", "diagnostics", "huggingface", "lightning", "trl", "cli"]
RANK = {name: rank for rank, name in enumerate(LAYERS)} | {"lightning": LAYERS.index("huggingface")}
ANYWHERE = {"_files", "_imports"}
FILES = sorted(ROOT.rglob("*.py"))


def layer_of(path):
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imported(path):
    """Names of our own modules and of third parties imported anywhere in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "poprisk_integrations":
                yield from (f"poprisk_integrations.{alias.name}" for alias in node.names)
            else:
                yield node.module or ""


def test_the_package_was_found():
    assert {layer_of(p) for p in FILES} >= set(LAYERS)
    assert len(FILES) > 30


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_direction(path):
    layer = layer_of(path)
    if layer in ("__init__", *ANYWHERE):
        return
    for name in imported(path):
        parts = name.split(".")
        if parts[0] != "poprisk_integrations" or len(parts) < 2:
            continue
        target = parts[1]
        if target in ANYWHERE or target in ("PopRiskAdamW", "__version__"):
            continue
        assert RANK[target] <= RANK[layer], f"{layer} imports {name}"
        assert {layer, target} != {"huggingface", "lightning"}, f"{layer} imports {name}"


@pytest.mark.parametrize("layer", ["core", "distributed", "optim", "diagnostics"])
def test_lower_layers_need_torch_only(layer):
    allowed = {*sys.stdlib_module_names, "torch", "typing_extensions", "poprisk_integrations"}
    for path in FILES:
        if layer_of(path) == layer:
            late = {"triton"} if "_triton" in path.stem else set()  # on the first fused step
            assert {name.split(".")[0] for name in imported(path)} <= allowed | late, path


def run(code):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout.split()


def test_import_adds_no_framework():
    code = (
        "import sys, torch; before = set(sys.modules); import poprisk_integrations;"
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    added = set(run(code)) - set(sys.stdlib_module_names) - {"torch"}
    assert added == {"poprisk_integrations"}


def test_import_is_quick():
    """A twelfth of torch's own import at most, in CPU time: the machine is shared."""
    code = (
        "import time; start = time.process_time(); import torch; middle = time.process_time();"
        "import poprisk_integrations; end = time.process_time();"
        "print((end - middle) / (middle - start))"
    )
    assert min(float(run(code)[0]) for _ in range(3)) < 1 / 12

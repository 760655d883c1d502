"""Every public name is there, or its extra is named."""

import importlib
import subprocess
import sys
from importlib.util import find_spec

import pytest

from poprisk_integrations import PopRiskAdamW, __version__

NEEDS = {
    "": (),
    ".core": (),
    ".distributed": (),
    ".optim": (),
    ".diagnostics": (),
    ".huggingface": ("transformers", "accelerate"),
    ".lightning": ("lightning", "pytorch_lightning"),
    ".trl": ("transformers", "datasets", "trl"),
}


def _is_installed(module: str) -> bool:
    found = [find_spec(name) is not None for name in NEEDS[module]]
    return any(found) if module == ".lightning" else all(found)


@pytest.mark.parametrize("module", NEEDS)
def test_public_names(module: str) -> None:
    path = f"poprisk_integrations{module}"
    if not _is_installed(module):
        with pytest.raises(ImportError, match="pip install 'poprisk_integrations"):
            importlib.import_module(path)
        return
    found = importlib.import_module(path)
    assert found.__all__
    assert all(hasattr(found, name) for name in found.__all__)


def test_the_command_says_its_version() -> None:
    command = [sys.executable, "-m", "poprisk_integrations.cli", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert __version__ in done.stdout


def test_torch_only() -> None:
    assert PopRiskAdamW.__module__.startswith("poprisk_integrations.")

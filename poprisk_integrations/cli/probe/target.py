"""Finds what `module:name` means."""

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from poprisk_integrations.cli.errors import UsageError, one_line

__all__ = ["load_target"]


def load_target(target: str) -> Any:
    """The object that `package.module:name` or `path/file.py:name` names.

    As for a script, the current directory (or that of the file) comes first on the path.

    Args:
        target: Module and name, a colon between them.

    Raises:
        UsageError: If it is not of that form, the module cannot be imported or lacks the name.
    """
    place, colon, name = target.rpartition(":")
    if not (colon and place and name):
        raise UsageError(
            f"{target!r} is no target: give package.module:NAME or path/file.py:NAME, "
            "or --config CONFIG.yaml"
        )
    module = _import_file(place) if place.endswith(".py") else _import_module(place)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise UsageError(f"{place!r} has no {name!r}")
        found = getattr(found, part)
    return found


def _import_module(name: str) -> ModuleType:
    sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever the module itself raises
        raise UsageError(f"cannot import {name!r}: {_cause(error)}") from error


def _import_file(place: str) -> ModuleType:
    path = Path(place)
    if not path.is_file():
        raise UsageError(f"no script at {place!r}")
    sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[path.stem]
        raise UsageError(f"cannot import {place!r}: {_cause(error)}") from error
    return module


def _cause(error: Exception) -> str:
    return one_line(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"

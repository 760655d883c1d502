"""`poprisk run`: registers the optimizer names, then runs a script or module."""

import argparse
import importlib.util
import os
import runpy
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

from poprisk_integrations.cli.errors import UsageError, one_line

__all__ = ["add_parser", "run"]


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `run` to the command line."""
    parser = subparsers.add_parser(
        "run",
        help="run a script or module with optim='poprisk_adamw' known to transformers",
        description="Registers the optimizer names with transformers, then runs TARGET as Python "
        "would. Under a launcher: `accelerate launch -m poprisk_integrations.cli run TARGET`, "
        "`torchrun -m poprisk_integrations.cli run TARGET`.",
    )
    parser.add_argument("target", metavar="TARGET", help="a path that ends in .py, or a module")
    rest = parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="ARGUMENT", help="passed to TARGET"
    )
    rest.required = False  # or else argparse's error lists it beside TARGET
    # Errors of the target are its own: they keep their traceback and exit status.
    parser.set_defaults(run=run, own_errors=False)


def run(args: argparse.Namespace) -> int:
    """Run the target in this process, as `__main__`."""
    name = args.target
    is_script = name.endswith(".py")
    if is_script and not Path(name).is_file():
        raise UsageError(f"no script at {name!r}")
    # As Python does: the script's directory, or for a module the current one, comes first.
    sys.path[0] = str(Path(name).resolve().parent) if is_script else os.getcwd()
    if not is_script:
        found = _find(name)
        if found is None:
            raise UsageError(f"no module named {name!r} (a script must end in .py)")
        if found.submodule_search_locations is not None and _find(f"{name}.__main__") is None:
            raise UsageError(f"{name!r} is a package, or a folder, without a __main__.py to run")
    try:
        import poprisk_integrations.huggingface  # noqa: F401  (registers the names)
    except ImportError as error:
        raise UsageError(one_line(error)) from error
    sys.argv = [name, *args.arguments]
    if is_script:
        runpy.run_path(name, run_name="__main__")
    else:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    return 0


def _find(name: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):  # a parent is missing, or the name is not one
        return None

"""`poprisk run`: registers the optimizer names, then runs a script or module."""

import argparse
import importlib.util
import os
import runpy
import sys
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
    """Run the target in this process, as `__main__`.

    Raises:
        UsageError: If the target does not exist, or transformers is missing.
    """
    is_script = args.target.endswith(".py")
    if is_script and not Path(args.target).is_file():
        raise UsageError(f"no script at {args.target!r}")
    # As Python does: the script's directory, or for a module the current one, comes first.
    sys.path[0] = str(Path(args.target).resolve().parent) if is_script else os.getcwd()
    if not is_script and not _module_exists(args.target):
        raise UsageError(f"no module named {args.target!r} (a script must end in .py)")
    if not is_script and _is_package(args.target) and not _module_exists(f"{args.target}.__main__"):
        raise UsageError(f"{args.target!r} is a package, or a folder, without a __main__.py to run")
    try:
        import poprisk_integrations.huggingface  # noqa: F401  (registers the names)
    except ImportError as error:
        raise UsageError(one_line(error)) from error
    sys.argv = [args.target, *args.arguments]
    if is_script:
        runpy.run_path(args.target, run_name="__main__")
    else:
        runpy.run_module(args.target, run_name="__main__", alter_sys=True)
    return 0


def _module_exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # a parent is missing, or the name is not one
        return False


def _is_package(name: str) -> bool:
    found = importlib.util.find_spec(name)
    return found is not None and found.submodule_search_locations is not None

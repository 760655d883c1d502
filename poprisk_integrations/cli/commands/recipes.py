"""`poprisk recipes`: list, copy and run the recipes."""

import argparse
import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from poprisk_integrations.cli.errors import UsageError, one_line
from poprisk_integrations.cli.recipe_index import all_recipes, find_recipe

__all__ = ["add_parser", "run"]


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `recipes` to the command line."""
    parser = subparsers.add_parser(
        "recipes",
        help="list, copy or run the recipes",
        description="Recipes are folders with a README, a configuration and a smoke run.",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    listing = actions.add_parser("list", help="what there is (also without an action)")
    listing.add_argument("--json", action="store_true", help="print JSON instead of a table")
    copying = actions.add_parser("copy", help="copy a recipe to change it")
    copying.add_argument("name", metavar="RECIPE")
    copying.add_argument("to", nargs="?", type=Path, help="a new folder; ./RECIPE by default")
    running = actions.add_parser(
        "run",
        help="run a recipe as it is",
        description="Runs the recipe's command in its folder's copy of the configuration, writing "
        "to the current directory. What follows the name goes to the command.",
    )
    running.add_argument("--smoke", action="store_true", help="seconds on a CPU, offline")
    running.add_argument("name", metavar="RECIPE")
    rest = running.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGUMENT")
    rest.required = False
    parser.set_defaults(run=run, action="list", json=False)


def run(args: argparse.Namespace) -> int:
    """List, copy or run.

    Raises:
        UsageError: If there is no such recipe, or the copy's folder exists.
    """
    if args.action == "copy":
        return _copy(args.name, args.to)
    if args.action == "run":
        return _run(args.name, args.arguments, smoke=args.smoke)
    return _list(as_json=args.json)


def _list(*, as_json: bool) -> int:
    recipes = all_recipes()
    if as_json:
        rows = [dataclasses.asdict(r) | {"folder": str(r.folder), "name": r.name} for r in recipes]
        print(json.dumps(rows, indent=2))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("recipe", "framework", "task", "hardware"):
        table.add_column(column, no_wrap=column in ("recipe", "framework"))
    for r in recipes:
        table.add_row(r.name, r.framework, r.task, r.hardware)
    Console().print(table)
    return 0


def _copy(name: str, to: Path | None) -> int:
    recipe = find_recipe(name)
    target = Path(name) if to is None else to
    if target.exists():
        raise UsageError(f"Invalid folder: {str(target)!r}. It exists; name a new one.")
    if not target.absolute().parent.is_dir():
        raise UsageError(f"Invalid folder: {str(target)!r}. Its parent does not exist.")
    try:  # whole or not at all
        with tempfile.TemporaryDirectory(dir=target.absolute().parent) as scratch:
            copied = Path(scratch) / "copy"
            shutil.copytree(recipe.folder, copied, ignore=shutil.ignore_patterns("__pycache__"))
            os.replace(copied, target)
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise UsageError(f"Invalid folder: cannot write {str(target)!r} ({reason}).") from error
    print(target)
    return 0


def _run(name: str, arguments: list[str], *, smoke: bool) -> int:
    recipe = find_recipe(name)
    words = shlex.split(recipe.smoke if smoke else recipe.run)
    known = {
        "python": [sys.executable],
        "poprisk": [sys.executable, "-m", "poprisk_integrations.cli"],
    }
    head = known.get(words[0])
    if head is None:  # a launcher, beside this interpreter
        found = shutil.which(
            words[0], path=f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}"
        )
        if found is None:
            raise UsageError(f"{name} is started by {words[0]!r}, which is not installed")
        head = [found]
    # Files are named relative to the folder; what is written goes to the current directory.
    files = [str(recipe.folder / w) if (recipe.folder / w).is_file() else w for w in words[1:]]
    command = [*head, *files, *arguments]
    print(shlex.join(command), flush=True)
    return subprocess.run(command, check=False).returncode

"""`poprisk recipes`: the folders of recipes, whose `card.yaml` says what they are."""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from poprisk_integrations._imports import require
from poprisk_integrations.cli.errors import UsageError, one_line
from poprisk_integrations.cli.output import writing

__all__ = ["CARD", "add_parser", "all_recipes", "read_card", "recipes_root", "run"]

CARD = "card.yaml"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A folder that can be copied and run; all but the folder is from its card."""

    folder: Path
    framework: str  # "trl", "transformers" or "lightning"
    task: str
    hardware: str  # that the full run needs
    minutes: str  # that it takes, or "not measured"
    verified: str  # what of it has been run, and by what
    # Words of the command inside the folder; "python" and "poprisk" stand for this interpreter and
    # this package.
    run: str
    smoke: str  # the same in seconds on a CPU, offline

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.name


_CARD_KEYS = [one.name for one in fields(Recipe) if one.name != "folder"]


def recipes_root() -> Path:
    """Where the recipes are: beside the package in a checkout, in `share/` once installed."""
    checkout = Path(__file__).parents[2] / "recipes"
    installed = Path(sysconfig.get_path("data")) / "share" / "poprisk_integrations" / "recipes"
    for root in (checkout, installed):
        if (root / "README.md").is_file():
            return root
    raise UsageError(f"no recipes at {str(checkout)!r} or {str(installed)!r}")


def read_card(path: Path) -> dict[str, Any] | None:
    """Content of a card; None if the file is something else."""
    import yaml

    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    is_card = isinstance(content, dict) and {*content} == {*_CARD_KEYS}
    return content if is_card else None


def all_recipes(root: Path | None = None) -> list[Recipe]:
    """All of them by name; those of this installation by default."""
    require("yaml", extra="hf")
    import yaml

    recipes = []
    for path in sorted((recipes_root() if root is None else root).glob(f"*/{CARD}")):
        try:
            content = read_card(path)
        except yaml.YAMLError as error:
            raise UsageError(f"{str(path)!r} is not YAML ({one_line(error)})") from None
        if content is None:
            raise UsageError(f"{str(path)!r} must have the keys {', '.join(_CARD_KEYS)}")
        values = {name: str(content[name]) for name in _CARD_KEYS}
        recipes.append(Recipe(folder=path.parent, **values))
    return recipes


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `recipes` to the command line."""
    parser = subparsers.add_parser(
        "recipes",
        help="list, copy or run the recipes",
        description="A recipe is a folder with a README, a configuration, and a short run of it "
        "for a CPU.",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    listing = actions.add_parser("list", help="what there is (also without an action)")
    listing.add_argument("--json", action="store_true", help="print JSON instead of a table")
    copying = actions.add_parser("copy", help="copy a recipe to change it")
    copying.add_argument("name", metavar="RECIPE", help="a name from the list")
    copying.add_argument(
        "to", nargs="?", type=Path, metavar="FOLDER", help="a new folder; ./RECIPE by default"
    )
    running = actions.add_parser(
        "run",
        help="run a recipe as it is",
        description="Runs a recipe's command with its configuration, and writes to the current "
        "directory. What follows the name is passed to the command.",
    )
    running.add_argument(
        "--smoke", action="store_true", help="its short run: seconds on a CPU, offline"
    )
    running.add_argument("name", metavar="RECIPE", help="a name from the list")
    rest = running.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="ARGUMENT", help="passed to the command"
    )
    rest.required = False
    parser.set_defaults(run=run, action="list", json=False)


def run(args: argparse.Namespace) -> int:
    """List, copy or run."""
    recipes = {recipe.name: recipe for recipe in all_recipes()}
    if args.action in (None, "list"):
        return _list(list(recipes.values()), as_json=args.json)
    if args.name not in recipes:
        raise UsageError(f"Invalid recipe: {args.name!r}. Must be one of {', '.join(recipes)}.")
    recipe = recipes[args.name]
    if args.action == "copy":
        return _copy(recipe, args.to or Path(args.name))
    return _run(recipe, recipe.smoke if args.smoke else recipe.run, args.arguments)


def _list(recipes: list[Recipe], *, as_json: bool) -> int:
    if as_json:
        rows = [asdict(r) | {"folder": str(r.folder), "name": r.name} for r in recipes]
        print(json.dumps(rows, indent=2))
        return 0
    width = shutil.get_terminal_size().columns
    for r in recipes:
        print(r.name)
        for text in (f"{r.framework}: {r.task}", r.hardware):
            print(textwrap.indent(textwrap.fill(text, width - 4, break_on_hyphens=False), "    "))
    return 0


def _copy(recipe: Recipe, target: Path) -> int:
    if target.exists():
        raise UsageError(f"Invalid folder: {str(target)!r}. It exists; name a new one.")
    if not target.absolute().parent.is_dir():
        raise UsageError(f"Invalid folder: {str(target)!r}. Its parent does not exist.")
    with writing(target) as temporary:
        shutil.copytree(recipe.folder, temporary, ignore=shutil.ignore_patterns("__pycache__"))
    print(target)
    return 0


def _run(recipe: Recipe, line: str, arguments: list[str]) -> int:
    words = shlex.split(line)
    known = {
        "python": [sys.executable],
        "poprisk": [sys.executable, "-m", "poprisk_integrations.cli"],
    }
    head = known.get(words[0])
    if head is None:  # a launcher, beside this interpreter
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}"
        found = shutil.which(words[0], path=path)
        if found is None:
            raise UsageError(f"{recipe.name} is started by {words[0]!r}, which is not installed")
        head = [found]
    # Files are named relative to the folder; what is written goes to the current directory.
    files = [str(recipe.folder / w) if (recipe.folder / w).is_file() else w for w in words[1:]]
    command = [*head, *files, *arguments]
    print(shlex.join(command), flush=True)
    return subprocess.run(command, check=False).returncode

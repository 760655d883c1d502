"""The recipes: folders with a `card.yaml` that says what they are and how they are run."""

import sysconfig
from dataclasses import dataclass
from pathlib import Path

from poprisk_integrations._imports import require
from poprisk_integrations.cli.errors import UsageError

__all__ = [
    "RecipeEntry",
    "all_recipes",
    "check_config",
    "find_recipe",
    "index_table",
    "recipes_root",
]

CARD = "card.yaml"

FIELDS = ("framework", "task", "hardware", "minutes", "verified", "run", "smoke")


@dataclass(frozen=True, kw_only=True)
class RecipeEntry:
    """A folder that can be copied and run.

    Args:
        folder: Where it is.
        framework: "trl", "transformers" or "lightning".
        task: In a few words.
        hardware: What the full run needs.
        minutes: How long that takes, or "not measured".
        verified: What of it has been run, and by what.
        run: Words of the command of the full run, inside the folder; "python" and "poprisk" stand
            for this interpreter and this package.
        smoke: The same in seconds on a CPU, offline.
    """

    folder: Path
    framework: str
    task: str
    hardware: str
    minutes: str
    verified: str
    run: str
    smoke: str

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.name


def recipes_root() -> Path:
    """Where the recipes are: beside the package in a checkout, in `share/` once installed.

    Raises:
        UsageError: If they are in neither place.
    """
    checkout = Path(__file__).parents[2] / "recipes"
    installed = Path(sysconfig.get_path("data")) / "share" / "poprisk_integrations" / "recipes"
    for root in (checkout, installed):
        if (root / "README.md").is_file():
            return root
    raise UsageError(f"no recipes at {str(checkout)!r} or {str(installed)!r}")


def all_recipes(root: Path | None = None) -> list[RecipeEntry]:
    """All of them by name.

    Args:
        root: Folder of the recipes; that of this installation by default.

    Raises:
        UsageError: If a `card.yaml` is not what it should be.
    """
    require("yaml", extra="hf")
    folders = sorted((recipes_root() if root is None else root).glob(f"*/{CARD}"))
    return [_read(path) for path in folders]


def _read(path: Path) -> RecipeEntry:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UsageError(f"{str(path)!r} is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict) or sorted(content) != sorted(FIELDS):
        raise UsageError(f"{str(path)!r} must have the keys {', '.join(FIELDS)}")
    return RecipeEntry(folder=path.parent, **{name: str(content[name]) for name in FIELDS})


def find_recipe(name: str) -> RecipeEntry:
    """One by name.

    Raises:
        UsageError: If there is none of that name.
    """
    known = {recipe.name: recipe for recipe in all_recipes()}
    if name not in known:
        raise UsageError(f"Invalid recipe: {name!r}. Must be one of {', '.join(known)}.")
    return known[name]


def check_config(path: Path) -> None:
    """Refuse a recipe's card or folder where its settings are wanted, and name those.

    Args:
        path: Given as --config.

    Raises:
        UsageError: If it is a card, or is none of the recipe's files.
    """
    import yaml

    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        found = "is a folder"
    elif not path.exists():
        if not (folder / CARD).is_file():
            return  # whoever reads it says so
        found = "does not exist"
    else:
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            return
        if not isinstance(content, dict) or sorted(content) != sorted(FIELDS):
            return
        found = "is the card of a recipe, which says what it is"
    settings = [str(file) for file in sorted(folder.glob("*.yaml")) if _is_settings(file)]
    hint = f"its settings: --config {' or '.join(settings)}" if settings else "no settings there"
    raise UsageError(f"Invalid --config: {str(path)!r} {found}; {hint}.")


def _is_settings(path: Path) -> bool:
    return path.stem.startswith(("config", "smoke"))


def index_table(recipes: list[RecipeEntry]) -> str:
    """The table of `recipes/README.md`."""
    lines = [
        "| recipe | framework | task | hardware | minutes | verified |",
        "|---|---|---|---|---|---|",
    ]
    for r in recipes:
        cells = (f"[{r.name}]({r.name})", r.framework, r.task, r.hardware, r.minutes, r.verified)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)

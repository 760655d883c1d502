"""Scripts of recipes as modules."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

RECIPES = Path(__file__).parents[2] / "recipes"


def load_script(recipe: str, name: str = "train.py") -> ModuleType:
    """The script of a recipe, imported as Python would on running it, without running it."""
    path = RECIPES / recipe / name
    before = set(sys.modules)
    sys.path.insert(0, str(path.parent))  # for the files beside it
    try:
        spec = importlib.util.spec_from_file_location(f"recipe_{recipe.replace('-', '_')}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
        for other in set(sys.modules) - before:
            file = getattr(sys.modules[other], "__file__", None)
            if other != spec.name and file and Path(file).parent == path.parent:
                del sys.modules[other]  # another recipe may have a file of this name
    return module

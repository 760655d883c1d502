"""The benchmark's modules, a small task, and a short run of it."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

FOLDER = Path(__file__).parents[3] / "recipes" / "benchmarks" / "noisy_dpo"
SEEDS, CONDITIONS = [100, 0], ["flips 0", "flips 30"]


@pytest.fixture(scope="module")
def recipe():
    """The recipe's modules by name, without leaving them importable for other tests."""
    names = sorted(path.stem for path in FOLDER.glob("*.py"))
    kept = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(kept)


@pytest.fixture(scope="module")
def task(recipe, tmp_path_factory):
    """Two conditions of two seeds; references that have learned a little."""
    folder = tmp_path_factory.mktemp("sft")
    reference = recipe.sft.references(SEEDS, folder, samples=1000)
    sizes = recipe.pairs.Sizes(train=384, held=60, sampled=20, candidates=1.3)
    return recipe.pairs.build(CONDITIONS, SEEDS, reference, sizes)


@pytest.fixture(scope="module")
def trace(recipe, task):
    return recipe.training.train(task, recipe.arms.A1, 1e-3, epochs=(1, 2))


# Twins: one member, one sequence at a time, in double precision, without the recipe's tensors.

"""`poprisk recipes`: what there is, a copy of one, a run of one."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from poprisk_integrations.cli import recipe_index
from poprisk_integrations.cli.main import main

ROOT = Path(__file__).parents[3]
RECIPES = ROOT / "recipes"


@pytest.fixture
def there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_list(capsys):
    assert main(["recipes", "list"]) == 0
    table = capsys.readouterr().out
    assert main(["recipes"]) == 0
    assert capsys.readouterr().out == table
    assert main(["recipes", "list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in rows} == {p.parent.name for p in RECIPES.glob("*/card.yaml")}
    for row in rows:
        assert row["name"] in table
        assert Path(row["folder"]).is_dir()


def test_copy_is_the_folder(there, capsys):
    assert main(["recipes", "copy", "dpo-noisy-zero3"]) == 0
    assert main(["recipes", "copy", "dpo-noisy-zero3", "mine"]) == 0
    assert capsys.readouterr().out.split() == ["dpo-noisy-zero3", "mine"]
    for name in ("dpo-noisy-zero3", "mine"):
        copied = {p.name: p.read_bytes() for p in (there / name).iterdir()}
        original = {p.name: p.read_bytes() for p in (RECIPES / "dpo-noisy-zero3").iterdir()}
        assert copied == original
    assert sorted(p.name for p in there.iterdir()) == ["dpo-noisy-zero3", "mine"]  # no scratch


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["copy", "nothing"], "Invalid recipe: 'nothing'. Must be one of dpo-noisy-7b-lora,"),
        (["run", "nothing"], "Invalid recipe: 'nothing'."),
        (["copy", "dpo-noisy-zero3", "here"], "Invalid folder: 'here'. It exists"),
        (["copy", "dpo-noisy-zero3", "a/b"], "Invalid folder: 'a/b'. Its parent does not exist."),
        (["burn"], "invalid choice: 'burn'"),
    ],
)
def test_bad_input_is_one_line(there, capsys, arguments, said):
    (there / "here").mkdir()
    assert main(["recipes", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert [p.name for p in there.iterdir()] == ["here"]


def test_run_writes_to_the_current_directory(there, capfd):
    arguments = ["--epochs", "2", "--out", "here"]
    assert main(["recipes", "run", "trainer-stop-noisy-digits", *arguments]) == 0
    out = capfd.readouterr().out.splitlines()
    script = RECIPES / "trainer-stop-noisy-digits" / "train.py"
    assert shlex.split(out[0]) == [sys.executable, str(script), *arguments]
    assert (there / "here").is_dir()
    assert main(["recipes", "run", "--smoke", "trainer-stop-noisy-digits", "--epochs", "x"]) != 0


@pytest.mark.parametrize("recipe", recipe_index.all_recipes(RECIPES), ids=lambda r: r.name)
def test_commands_name_files_that_are_there(recipe):
    for command in (recipe.run, recipe.smoke):
        words = shlex.split(command)
        assert words[0] in ("python", "poprisk", "accelerate", "torchrun")
        named = [w for w in words if w.endswith((".py", ".yaml"))]
        assert named
        assert all((recipe.folder / name).is_file() for name in named)


@pytest.mark.parametrize("recipe", recipe_index.all_recipes(RECIPES), ids=lambda r: r.name)
def test_the_commands_of_its_readme_work_as_they_are_typed(recipe):
    """Wherever one is, after the package is installed: the folder is fetched before it is used."""
    folder = None
    for block in re.findall(r"```bash\n(.*?)```", (recipe.folder / "README.md").read_text(), re.S):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words[:3] == ["poprisk", "recipes", "copy"]:
                assert words[3:] == [recipe.name, "&&", "cd", recipe.name]
                folder = recipe.folder
            elif words[:3] == ["poprisk", "recipes", "run"]:
                assert words[3:] == [recipe.name]
            read = words[: words.index(">")] if ">" in words else words
            for word in read:
                if word.endswith((".py", ".yaml", ".json", ".sh", ".sbatch")):
                    assert folder is not None, f"{word} is nowhere yet"
                    assert (folder / word).is_file()


def test_a_description_with_a_wrong_key_is_refused(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "card.yaml").write_text("framework: trl\nhardwear: GPU\n")
    with pytest.raises(recipe_index.UsageError, match="must have the keys framework, task"):
        recipe_index.all_recipes(tmp_path)
    (folder / "card.yaml").write_text("framework: [trl\n")
    with pytest.raises(recipe_index.UsageError, match="is not YAML"):
        recipe_index.all_recipes(tmp_path)


def test_the_wheel_takes_them_along():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    files = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["data-files"]
    prefix = "share/poprisk_integrations/recipes"
    assert files.pop(prefix) == ["recipes/README.md"]
    page = ["recipes/playground/README.md", "recipes/playground/playground.html"]
    assert files.pop(f"{prefix}/playground") == page  # not the table that it was made from
    folders = {f"{prefix}/{p.parent.name}": p.parent for p in RECIPES.glob("*/card.yaml")}
    assert files == {name: [f"recipes/{path.name}/*"] for name, path in folders.items()}
    assert all(child.is_file() for path in folders.values() for child in tracked(path))


def tracked(folder):
    return [p for p in folder.iterdir() if p.name != "__pycache__"]

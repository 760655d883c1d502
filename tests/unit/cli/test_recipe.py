"""Recipes: TRL's keys and ours from YAML and the command line; mistakes give one line."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from poprisk_integrations.cli.errors import UsageError
from poprisk_integrations.cli.recipe import Recipe, parse_recipe, recipe_help

# transformers 5.23 deprecates a name that TRL 1.16 still uses.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

RECIPES = Path(__file__).parents[3] / "recipes"
MINIMAL = {"model_name_or_path": "m", "dataset_name": "d", "use_cpu": True, "bf16": False}


def write(tmp_path: Path, **keys: Any) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, "output_dir": str(tmp_path / "out"), **keys}))
    return str(path)


def parse(tmp_path: Path, *arguments: str, **keys: Any) -> Recipe:
    return parse_recipe(["--config", write(tmp_path, **keys), *arguments])


def test_keys_of_trl_and_ours(tmp_path: Path) -> None:
    recipe = parse(
        tmp_path, learning_rate="1e-4", beta=0.2, loss_type="robust", label_smoothing=0.2,
        stop_kappa=3, use_peft=True, lora_r=4, flip_rate=0.1, optim_args="alpha=0.2",
        datasets=[{"path": "json", "data_files": "pairs.json"}],
    )  # fmt: skip
    assert (recipe.training.learning_rate, recipe.training.beta) == (1e-4, 0.2)
    assert (recipe.training.loss_type, recipe.training.stop_kappa) == (["robust"], 3.0)
    assert (recipe.training.optim, recipe.training.stop) == ("poprisk_adamw", True)
    assert (recipe.model.lora_r, recipe.pairs.flip_rate) == (4, 0.1)
    assert recipe.mixture.datasets[0].data_files == "pairs.json"


def test_off_without_quotes(tmp_path: Path) -> None:
    path = Path(write(tmp_path))
    path.write_text(path.read_text() + "noise: off\nstop: off\nstop_restore: none\n")
    training = parse_recipe(["--config", str(path)]).training
    assert (training.noise, training.stop, training.stop_restore) == ("off", False, None)


def test_command_line_wins(tmp_path: Path) -> None:
    arguments = ("--optim", "adamw_torch", "--flip-rate", "0.3", "--stop", "false")
    recipe = parse(tmp_path, *arguments, optim="poprisk_adamw", flip_rate=0.1, stop=True)
    assert recipe.training.optim == "adamw_torch"
    assert recipe.pairs.flip_rate == 0.3
    assert recipe.training.stop is False


def test_config_with_an_equals_sign(tmp_path: Path) -> None:
    assert parse_recipe([f"--config={write(tmp_path)}"]).model.model_name_or_path == "m"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"learnin_rate": 1}, "unknown key in the recipe: 'learnin_rate'. Did you mean 'learning"),
        ({"noise": "sometimes"}, "Invalid noise: 'sometimes'. Must be one of"),
        ({"stop_kappa": 0}, "Invalid stop_kappa: 0"),
        ({"label_smoothing": 0.1}, "label_smoothing: 0.1"),
        ({"flip_rate": 1.5}, "Invalid flip_rate: 1.5"),
        ({"optim": "poprisk"}, "poprisk"),
        ({"learning_rate": "fast"}, "--learning-rate: invalid float value: 'fast'"),
        ({"datasets": [{"path": "json", "date_files": "x"}]}, "date_files"),
        ({"model_name_or_path": None}, "model_name_or_path is missing"),
        ({"dataset_name": None}, "dataset_name is missing"),
        ({"model_name_or_path": "builtin:llama"}, "'builtin:llama'; known: builtin:tiny-llama"),
        ({"dataset_name": "builtin:pairs"}, "'builtin:pairs'; known: builtin:tiny-pairs"),
    ],
)
def test_mistakes_in_the_file(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises((UsageError, ValueError)) as error:
        parse(tmp_path, **keys)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a recipe is missing"),
        (["--config"], "--config needs the path"),
        (["--learnin_rate", "1"], "unknown option '--learnin_rate'"),
        (["--flip", "0.3"], "unknown option '--flip'"),
        (["--stop_action", "halt"], "invalid choice: 'halt'"),
        (["stray"], "unknown option 'stray'"),
    ],
)
def test_mistakes_on_the_command_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_recipe(arguments)


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    with pytest.raises(FileNotFoundError):
        parse_recipe(["--config", str(path)])
    path.write_text("a: [1\nb: 2")
    with pytest.raises(UsageError, match=r"not valid YAML \(line 2, column"):
        parse_recipe(["--config", str(path)])
    path.write_text("- 1")
    with pytest.raises(ValueError, match="must contain a YAML mapping"):
        parse_recipe(["--config", str(path)])


def test_the_card_of_a_recipe_is_no_configuration(tmp_path: Path) -> None:
    """Nor is its folder, nor a name that it had: the answer names the files to give."""
    folder = RECIPES / "dpo-noisy-7b-lora"
    settings = f"its settings: --config {folder / 'config.yaml'} or {folder / 'smoke.yaml'}."
    for given, found in {
        folder / "card.yaml": "is the card of a recipe",
        folder / "recipe.yaml": "does not exist",
        folder: "is a folder",
    }.items():
        with pytest.raises(UsageError) as error:
            parse_recipe(["--config", str(given)])
        assert str(error.value).startswith(f"Invalid --config: {str(given)!r} {found}")
        assert str(error.value).endswith(settings)
    old = tmp_path / "recipe.yaml"  # a copy from before cards had this name
    old.write_text((folder / "card.yaml").read_text())
    with pytest.raises(UsageError, match=r"is the card of a recipe.*; no settings there\."):
        parse_recipe(["--config", str(old)])


def test_help_names_our_keys() -> None:
    text = recipe_help()
    assert all(f"--{name}" in text for name in ("stop_window", "noise", "flip_rate", "lora_r"))

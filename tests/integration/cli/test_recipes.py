"""Every recipe in the index is there, its config parses, and its smoke run trains."""

import json
import re
from pathlib import Path

import pytest
import yaml

from poprisk_integrations.cli.main import main
from poprisk_integrations.cli.recipe import parse_recipe
from tests.helpers.tiny_dpo import pairs, save_model

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # transformers 5.23 deprecates a name that TRL 1.16 still uses.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
]

RECIPES = Path(__file__).parents[3] / "recipes"
NAMES = sorted(path.parent.name for path in RECIPES.glob("*/config.yaml"))


def test_index_is_complete() -> None:
    listed = re.findall(r"^\| \[([\w.-]+)\]\(\1\)", (RECIPES / "README.md").read_text(), re.M)
    assert sorted(listed) == NAMES
    assert len(NAMES) == 1
    for name in NAMES:
        assert {path.name for path in (RECIPES / name).iterdir()} >= {"README.md", "smoke.yaml"}


@pytest.mark.parametrize("name", NAMES)
def test_config_parses(name: str) -> None:
    path = RECIPES / name / "config.yaml"
    on_cpu = ("--use_cpu", "true", "--bf16", "false")
    recipe = parse_recipe(["--config", str(path), *on_cpu])
    assert recipe.training.optim == "poprisk_adamw"
    assert recipe.training.stop
    # What the smoke run leaves out or cuts down is size, never a method.
    smoke = yaml.safe_load((path.parent / "smoke.yaml").read_text())
    config = yaml.safe_load(path.read_text())
    for key in ("optim", "stop", "flip_rate", "flip_seed", "beta", "drop_unusable_pairs"):
        assert smoke[key] == config[key]


@pytest.mark.parametrize("name", NAMES)
def test_smoke(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    pairs(20).to_json(data / "train.jsonl")
    pairs(8, seed=1).to_json(data / "test.jsonl")
    arguments = [
        "--model_name_or_path", save_model(tmp_path / "model"),
        "--dataset_name", str(data), "--output_dir", str(out), "--disable_tqdm", "true",
    ]  # fmt: skip
    assert main(["dpo", "--config", str(RECIPES / name / "smoke.yaml"), *arguments]) == 0
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert any("eval_poprisk/kl_data" in line for line in history)
    assert json.loads((out / "label_flips.json").read_text())["num_flipped"] == 6
    assert (out / "poprisk_stop.json").exists()

"""Every recipe in the index is there, its configs parse, and its smoke run trains, offline."""

import json
import re
import socket
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from poprisk_integrations.cli.main import main
from poprisk_integrations.cli.recipe import parse_recipe
from poprisk_integrations.cli.recipe_index import all_recipes, index_table

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # transformers 5.23 deprecates a name that TRL 1.16 still uses.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
]

RECIPES = Path(__file__).parents[3] / "recipes"
NAMES = sorted(path.parent.name for path in RECIPES.glob("dpo-*/config.yaml"))
CONFIGS = sorted(str(path.relative_to(RECIPES)) for path in RECIPES.glob("dpo-*/config*.yaml"))
SHARDED = ["dpo-noisy-fsdp2", "dpo-noisy-zero3"]
ON_CPU = ("--use_cpu", "true", "--bf16", "false")
# What a smoke run leaves out or cuts down is size, never a method.
METHOD = ("noise", "optim", "stop", "flip_rate", "flip_seed", "beta", "drop_unusable_pairs")


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content


def test_index_is_written_from_the_folders() -> None:
    text = (RECIPES / "README.md").read_text()
    assert index_table(all_recipes(RECIPES)) in text
    assert len(NAMES) == 4
    for name in NAMES:
        assert {path.name for path in (RECIPES / name).iterdir()} >= {"README.md", "smoke.yaml"}
    folders = {path.parent.name for path in RECIPES.glob("*/README.md")}
    assert folders - {"benchmarks", "playground"} == {
        recipe.name for recipe in all_recipes(RECIPES)
    }


@pytest.mark.parametrize("config", CONFIGS)
def test_config_parses(config: str) -> None:
    path = RECIPES / config
    recipe = parse_recipe(["--config", str(path), *ON_CPU])
    assert recipe.training.optim == "poprisk_adamw"
    assert recipe.training.stop
    assert recipe.training.noise == "auto"
    assert recipe.training.noise_rate is None  # estimated
    smoke = read(path.parent / "smoke.yaml")
    for key in METHOD:
        assert smoke[key] == read(path)[key]
    if path.name == "config.yaml":
        assert smoke.get("use_peft") == read(path).get("use_peft")
        assert smoke.get("lora_target_modules") == read(path).get("lora_target_modules")


@pytest.mark.parametrize("name", NAMES)
def test_commands_of_the_readme(name: str) -> None:
    """Each names a file that is there and options that exist."""
    found = re.findall(r"^(?:poprisk|accelerate launch .*\.cli) dpo (.*)$", readme(name), re.M)
    assert len(found) >= 3
    for line in found:
        arguments = re.sub(r"\s#.*", "", line).split()
        arguments[1] = str(RECIPES / name / arguments[1])
        recipe = parse_recipe([*arguments, *ON_CPU])
        assert recipe.model.load_in_4bit is ("--load_in_4bit" in line)


def readme(name: str) -> str:
    return (RECIPES / name / "README.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_smoke(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is: no option is added, the working directory is empty and there is no network."""

    def no_network(*args: object) -> NoReturn:
        raise AssertionError("a smoke run reached for the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.chdir(tmp_path)
    assert main(["dpo", "--config", str(RECIPES / name / "smoke.yaml")]) == 0
    out = tmp_path / "out-smoke"
    assert list(tmp_path.iterdir()) == [out]
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert any("eval_poprisk/kl_data" in line for line in history)
    assert json.loads((out / "label_flips.json").read_text())["num_flipped"] == 29
    assert json.loads((out / "poprisk_stop.json").read_text())["history"]
    # Of 96 pairs, without those that a model judged that had hardly learned.
    assert 48 <= json.loads((out / "poprisk_noise.json").read_text())["num_pairs"] <= 96
    assert '"train-0"' in (out / "flip_report.csv").read_text()
    assert (out / "flip_report.parquet").exists()
    adapter = out / "adapter_config.json"
    assert adapter.exists() is bool(read(RECIPES / name / "smoke.yaml").get("use_peft"))
    if adapter.exists():
        assert Path(json.loads(adapter.read_text())["base_model_name_or_path"]).is_dir()


@pytest.mark.parametrize("name", SHARDED)
def test_launcher_files(name: str) -> None:
    """accelerate knows every key, and ZeRO leaves the optimizer to Trainer."""
    full = load_config_from_file(str(RECIPES / name / "accelerate.yaml"))
    assert full.num_processes == 8
    if name == "dpo-noisy-fsdp2":
        assert full.distributed_type == "FSDP"
        assert full.fsdp_config["fsdp_version"] == 2
    else:
        assert full.distributed_type == "DEEPSPEED"
        assert full.deepspeed_config["zero_stage"] == 3
        assert full.deepspeed_config["offload_optimizer_device"] == "none"
        assert not any("optimizer" in key for key in full.deepspeed_config if "offload" not in key)
    smoke = load_config_from_file(str(RECIPES / name / "accelerate-smoke.yaml"))
    assert (smoke.num_processes, smoke.mixed_precision) == (2, "no")
    (launch,) = re.findall(
        r"^# (accelerate launch.*)$", (RECIPES / name / "config.yaml").read_text(), re.M
    )
    assert launch in readme(name)

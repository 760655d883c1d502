"""Recipes: each is in the index and in the wheel, its commands and configs hold, and it can be run.

What `poprisk recipes` prints and refuses is in tests/goldens/cli/recipes.txt.
"""

import json
import re
import shlex
import socket
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from poprisk_integrations.cli.dpo_config import parse_config
from poprisk_integrations.cli.errors import UsageError
from poprisk_integrations.cli.main import main
from poprisk_integrations.cli.recipes import all_recipes

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # transformers 5.23 deprecates a name that TRL 1.16 still uses.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
]

ROOT = Path(__file__).parents[3]
FOLDERS = ROOT / "recipes"
RECIPES = all_recipes(FOLDERS)
NAMES = sorted(path.parent.name for path in FOLDERS.glob("dpo-*/config.yaml"))
CONFIGS = sorted(str(path.relative_to(FOLDERS)) for path in FOLDERS.glob("dpo-*/config*.yaml"))
SHARDED = ["dpo-noisy-fsdp2", "dpo-noisy-zero3"]
ON_CPU = ("--use_cpu", "true", "--bf16", "false")
# What a smoke run leaves out or cuts down is size, never a method.
METHOD = ("noise", "optim", "stop", "flip_rate", "flip_seed", "beta", "drop_unusable_pairs")
FILES = (".py", ".yaml", ".json", ".sh", ".sbatch")


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content


def readme(name: str) -> str:
    return (FOLDERS / name / "README.md").read_text()


def test_index_is_written_from_the_folders() -> None:
    text = (FOLDERS / "README.md").read_text()
    columns = ("framework", "task", "hardware", "minutes", "verified")
    rows = [
        f"| [{r.name}]({r.name}) | {' | '.join(getattr(r, name) for name in columns)} |"
        for r in RECIPES
    ]
    assert "\n".join([f"| recipe | {' | '.join(columns)} |", "|---" * 6 + "|", *rows]) in text
    assert len(NAMES) == 4
    folders = {path.parent.name for path in FOLDERS.glob("*/README.md")}
    assert folders - {"benchmarks", "playground", "quickstart"} == {
        recipe.name for recipe in RECIPES
    }


def test_the_wheel_takes_them_along() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    files = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["data-files"]
    prefix = "share/poprisk_integrations/recipes"
    assert files.pop(prefix) == ["recipes/README.md"]
    page = ["recipes/playground/README.md", "recipes/playground/playground.html"]
    assert files.pop(f"{prefix}/playground") == page  # not the table that it was made from
    assert files.pop(f"{prefix}/quickstart") == ["recipes/quickstart/README.md"]
    assert files == {f"{prefix}/{r.name}": [f"recipes/{r.name}/*"] for r in RECIPES}
    assert all(p.is_file() for r in RECIPES for p in r.folder.iterdir() if p.name != "__pycache__")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.name)
def test_commands_name_files_that_are_there(recipe: Any) -> None:
    """Those of the card, and those of the README as they are typed, wherever one is."""
    for command in (recipe.run, recipe.smoke):
        words = shlex.split(command)
        assert words[0] in ("python", "poprisk", "accelerate", "torchrun")
        named = [w for w in words if w.endswith((".py", ".yaml"))]
        assert named
        assert all((recipe.folder / name).is_file() for name in named)
    folder = None  # fetched before it is used
    for block in re.findall(r"```bash\n(.*?)```", readme(recipe.name), re.S):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words[:3] == ["poprisk", "recipes", "copy"]:
                assert words[3:] == [recipe.name, "&&", "cd", recipe.name]
                folder = recipe.folder
            elif words[:3] == ["poprisk", "recipes", "run"]:
                assert words[3:] == [recipe.name]
            for word in words[: words.index(">")] if ">" in words else words:
                if word.endswith(FILES):
                    assert folder is not None, f"{word} is nowhere yet"
                    assert (folder / word).is_file()


def test_copy_is_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "copy", "dpo-noisy-zero3", "mine"]) == 0
    copied = {p.name: p.read_bytes() for p in Path("mine").iterdir()}
    assert copied == {p.name: p.read_bytes() for p in (FOLDERS / "dpo-noisy-zero3").iterdir()}


def test_run_stays_in_the_current_directory_and_passes_the_status_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A made-up recipe, whose script says where it runs and what it was given."""
    folder = tmp_path / "recipes" / "mine"
    folder.mkdir(parents=True)
    code = "import os, sys\nprint(sys.argv, os.getcwd())\nsys.exit(len(sys.argv))\n"
    (folder / "job.py").write_text(code)
    card = dict.fromkeys(("framework", "task", "hardware", "minutes", "verified"), "x")
    card |= {"run": "python job.py full", "smoke": "python job.py"}
    (folder / "card.yaml").write_text(yaml.safe_dump(card))
    monkeypatch.setattr("poprisk_integrations.cli.recipes.recipes_root", lambda: folder.parent)
    monkeypatch.chdir(tmp_path)
    for options, given in (([], ["full", "--x"]), (["--smoke"], ["--x"])):
        script = [str(folder / "job.py"), *given]
        assert main(["recipes", "run", *options, "mine", "--x"]) == len(script)
        command, printed = capfd.readouterr().out.splitlines()
        assert shlex.split(command) == [sys.executable, *script]
        assert printed == f"{script} {tmp_path}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("framework: trl\nhardwear: GPU\n", "must have the keys framework, task"),
        ("framework: [trl\n", "is not YAML"),
    ],
)
def test_a_wrong_card_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "card.yaml").write_text(text)
    with pytest.raises(UsageError, match=message):
        all_recipes(tmp_path)


# The recipes of `poprisk dpo`.


@pytest.mark.parametrize("name", CONFIGS)
def test_config_parses(name: str) -> None:
    path = FOLDERS / name
    config = parse_config(["--config", str(path), *ON_CPU])
    assert config.training.optim == "poprisk_adamw"
    assert config.training.stop
    assert config.training.noise == "auto"
    assert config.training.noise_rate is None  # estimated
    same = METHOD if path.name != "config.yaml" else (*METHOD, "use_peft", "lora_target_modules")
    smoke, full = read(path.parent / "smoke.yaml"), read(path)
    assert {key: smoke.get(key) for key in same} == {key: full.get(key) for key in same}


@pytest.mark.parametrize("name", NAMES)
def test_commands_of_the_readme_have_options_that_exist(name: str) -> None:
    found = re.findall(r"^(?:poprisk|accelerate launch .*\.cli) dpo (.*)$", readme(name), re.M)
    assert len(found) >= 3
    for line in found:
        arguments = re.sub(r"\s#.*", "", line).split()
        arguments[1] = str(FOLDERS / name / arguments[1])
        config = parse_config([*arguments, *ON_CPU])
        assert config.model.load_in_4bit is ("--load_in_4bit" in line)


@pytest.mark.parametrize("name", NAMES)
def test_smoke(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is: no option is added, the working directory is empty and there is no network."""

    def no_network(*args: object) -> NoReturn:
        raise AssertionError("a smoke run reached for the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.chdir(tmp_path)
    assert main(["dpo", "--config", str(FOLDERS / name / "smoke.yaml")]) == 0
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
    assert adapter.exists() is bool(read(FOLDERS / name / "smoke.yaml").get("use_peft"))
    if adapter.exists():
        assert Path(json.loads(adapter.read_text())["base_model_name_or_path"]).is_dir()


@pytest.mark.parametrize("name", SHARDED)
def test_launcher_files(name: str) -> None:
    """accelerate knows every key, and ZeRO leaves the optimizer to Trainer."""
    full = load_config_from_file(str(FOLDERS / name / "accelerate.yaml"))
    assert full.num_processes == 8
    if name == "dpo-noisy-fsdp2":
        assert (full.distributed_type, full.fsdp_config["fsdp_version"]) == ("FSDP", 2)
    else:
        assert (full.distributed_type, full.deepspeed_config["zero_stage"]) == ("DEEPSPEED", 3)
        assert full.deepspeed_config["offload_optimizer_device"] == "none"
        assert not any("optimizer" in key for key in full.deepspeed_config if "offload" not in key)
    smoke = load_config_from_file(str(FOLDERS / name / "accelerate-smoke.yaml"))
    assert (smoke.num_processes, smoke.mixed_precision) == (2, "no")
    (launch,) = re.findall(
        r"^# (accelerate launch.*)$", (FOLDERS / name / "config.yaml").read_text(), re.M
    )
    assert launch in readme(name)

"""The recipe trl-sft-stop, and the copies of its script in the recipes for several processes."""

import json

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from datasets import Dataset, DatasetDict
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from poprisk_integrations.cli.main import main
from poprisk_integrations.huggingface.optimizer import check_deepspeed_config
from tests.helpers.recipe_script import RECIPES, load_script

# transformers 5.23 deprecates a name that TRL 1.16 still uses.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

COPIES = ("trl-sft-stop", "multi-gpu-launch", "two-node-torchrun")
LAUNCH = RECIPES / "multi-gpu-launch"
ON_CPU = ["--use_cpu", "true", "--bf16", "false"]


@pytest.fixture(scope="module")
def script():
    return load_script("trl-sft-stop")


def test_one_script(script):
    texts = {(RECIPES / name / "train.py").read_text() for name in COPIES}
    assert len(texts) == 1


@pytest.mark.parametrize("recipe", COPIES)
def test_config_parses(script, recipe):
    config = ["--config", str(RECIPES / recipe / "config.yaml"), *ON_CPU]
    data, args, model, stop = script.parse(config)
    assert data.dataset_name == "trl-lib/Capybara"
    assert model.model_name_or_path.startswith("Qwen/Qwen2.5-")
    assert (args.optim, args.optim_args) == ("poprisk_adamw", "no_gate=embed")
    assert (args.packing, args.max_grad_norm, args.num_train_epochs) == (False, 0.0, 3)
    assert (stop.stop_criterion, stop.stop_sit_out, stop.stop_action) == ("auto", 0.15, None)
    changed = script.parse([*config, "--stop_kappa", "3", "--stop_action", "monitor"])[3]
    assert (changed.stop_kappa, changed.stop_action) == (3.0, "monitor")
    with pytest.raises(ValueError, match="stop_kapa"):
        script.parse([*config, "--stop_kapa", "3"])


def test_smoke_stops_and_restores_its_best_checkpoint(script, offline):
    smoke = str(RECIPES / "trl-sft-stop" / "smoke.yaml")
    trainer = script.main(["--config", smoke, "--disable_tqdm", "true"])
    assert type(trainer.optimizer.optimizer).__name__ == "PopRiskAdamW"
    out = offline / "out-smoke"
    assert list(offline.iterdir()) == [out]
    report = json.loads((out / "poprisk_stop.json").read_text())
    assert report["criterion"] == "risk"
    assert report["stopped"]
    best = report["best_step"]
    assert best < 100  # of 480
    assert report["stop_step"] == best + 10 * 16  # patience
    assert trainer.state.global_step < 400  # with the cooldown
    # Lists without wrong words: the model was not trained on one.
    assert trainer.state.log_history[-1]["eval_mean_token_accuracy"] > 0.88
    assert (out / "model.safetensors").is_file()
    assert main(["report", str(out), "--out", str(offline / "page.html")]) == 0


def test_data_as_the_full_run_loads_them(script, monkeypatch):
    data, *_ = script.parse(["--config", str(RECIPES / "trl-sft-stop" / "config.yaml"), *ON_CPU])
    asked = []

    def load_dataset(path, **options):
        asked.append((path, options))
        return DatasetDict(train=Dataset.from_dict({"text": ["one"]}))

    monkeypatch.setattr(script, "load_dataset", load_dataset)
    assert script.load_texts(data)["train"].num_rows == 1
    assert asked == [("trl-lib/Capybara", {"name": None, "streaming": False})]


def test_last_checkpoint(script, tmp_path):
    def found(resume):
        options = [*ON_CPU, "--output_dir", str(tmp_path / "out")]
        options += [] if resume is None else ["--resume_from_checkpoint", resume]
        return script.checkpoint(script.parse(options)[1])

    assert found("last") is None
    for step in (4, 12):
        (tmp_path / "out" / f"checkpoint-{step}").mkdir(parents=True)
    assert found("last") == str(tmp_path / "out" / "checkpoint-12")
    assert found("elsewhere") == "elsewhere"
    assert found(None) is None


def test_launcher_files():
    """accelerate knows every key, and ZeRO leaves the optimizer to Trainer."""
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}
    files = {name: load_config_from_file(str(LAUNCH / f"{name}.yaml")) for name in kinds}
    for name, kind in kinds.items():
        assert (files[name].distributed_type, files[name].num_processes) == (kind, 8)
    assert files["fsdp2"].fsdp_config["fsdp_version"] == 2
    assert files["zero3"].deepspeed_config["zero_stage"] == 3
    assert files["zero3"].deepspeed_config["offload_optimizer_device"] == "none"
    zero3 = HfTrainerDeepSpeedConfig(str(LAUNCH / "zero3.json")).config
    check_deepspeed_config(zero3)
    assert zero3["zero_optimization"]["stage"] == 3

"""Configs: TRL's keys and ours from YAML and the command line.

Mistakes in them are in tests/goldens/cli/dpo.txt.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml

from poprisk_integrations.cli.dpo_config import DPOArguments, config_help, parse_config

# transformers 5.23 deprecates a name that TRL 1.16 still uses.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

CONFIG = {"model_name_or_path": "m", "dataset_name": "d", "use_cpu": True, "bf16": False}


def parse(tmp_path: Path, *arguments: str, text: str = "", **keys: Any) -> DPOArguments:
    path = tmp_path / "config.yaml"
    keys = {**CONFIG, "output_dir": str(tmp_path / "out"), **keys}
    path.write_text(yaml.safe_dump(keys) + text)
    return parse_config([f"--config={path}", *arguments])


def test_keys_of_trl_and_ours(tmp_path: Path) -> None:
    config = parse(
        tmp_path, learning_rate="1e-4", beta=0.2, loss_type="robust", label_smoothing=0.2,
        stop_kappa=3, use_peft=True, lora_r=4, flip_rate=0.1, optim_args="alpha=0.2",
        datasets=[{"path": "json", "data_files": "pairs.json"}],
    )  # fmt: skip
    assert (config.training.learning_rate, config.training.beta) == (1e-4, 0.2)
    assert (config.training.loss_type, config.training.stop_kappa) == (["robust"], 3.0)
    assert (config.training.optim, config.training.stop) == ("poprisk_adamw", True)
    assert (config.model.lora_r, config.pairs.flip_rate) == (4, 0.1)
    assert config.mixture.datasets[0].data_files == "pairs.json"


def test_off_without_quotes(tmp_path: Path) -> None:
    training = parse(tmp_path, text="noise: off\nstop: off\nstop_restore: none\n").training
    assert (training.noise, training.stop, training.stop_restore) == ("off", False, None)


def test_command_line_wins(tmp_path: Path) -> None:
    arguments = ("--optim", "adamw_torch", "--flip-rate", "0.3", "--stop", "false")
    config = parse(tmp_path, *arguments, optim="poprisk_adamw", flip_rate=0.1, stop=True)
    assert (config.training.optim, config.training.stop) == ("adamw_torch", False)
    assert config.pairs.flip_rate == 0.3


def test_help_names_our_keys() -> None:
    text = config_help()
    assert all(f"--{name}" in text for name in ("stop_window", "noise", "flip_rate", "lora_r"))

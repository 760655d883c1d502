"""`poprisk dpo` from a config to a saved model.

What it refuses is in tests/goldens/cli/dpo.txt.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from poprisk_integrations.cli.main import main
from poprisk_integrations.trl.label_flips import flipped_rows
from tests.helpers.tiny_dpo import pairs, save_model

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # transformers 5.23 deprecates names that TRL 1.16 and transformers itself still use.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a config for a tiny local model and local data; returns its path."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    model = save_model(tmp_path / "model")
    pairs(20).to_json(tmp_path / "pairs.jsonl")

    def write(**changes: Any) -> str:
        keys: dict[str, Any] = {
            "model_name_or_path": model,
            "dataset_name": str(tmp_path / "pairs.jsonl"),
            "output_dir": str(tmp_path / "out"),
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "per_device_train_batch_size": 4,
            "max_steps": 4,
            "learning_rate": 1e-3,
            "stop_criterion": "signal",
            "stop_window": 4,
            "logging_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
        }
        keys = {name: value for name, value in {**keys, **changes}.items() if value is not None}
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(keys))
        return str(path)

    return write


def test_from_config_to_model(
    config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["dpo", "--config", config(), "--flip-rate", "0.3", "--flip_seed", "5"]) == 0
    out = tmp_path / "out"
    AutoModelForCausalLM.from_pretrained(out)
    AutoTokenizer.from_pretrained(out)
    flips = json.loads((out / "label_flips.json").read_text())
    assert flips == {
        "flip_rate": 0.3,
        "flip_seed": 5,
        "num_pairs": 20,
        "num_flipped": 6,
        "rows": flipped_rows(20, 0.3, seed=5),
    }
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert "poprisk/signal_ratio" in history[-2]
    assert "poprisk/margin_p50" in history[-2]
    assert (out / "poprisk_stop.json").exists()
    printed = capsys.readouterr().out
    assert "6 of 20 training labels swapped" in printed
    assert "4 of 4 steps" in printed
    assert "\nstop: " in printed
    assert not list(out.glob("*.tmp*"))


def test_what_to_do_about_the_labels_is_said_at_the_end(
    config: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `poprisk flips` says it of the files."""
    path = config(noise="cdpo", noise_rate=0.499, learning_rate=1e-2, max_steps=5)
    assert main(["dpo", "--config", path]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("labels: ")]
    keys = yaml.safe_load(Path(path).read_text())
    assert main(["flips", keys["output_dir"], "--dataset", keys["dataset_name"], "--json"]) == 0
    advice = json.loads(capsys.readouterr().out)["advice"]
    assert line == f"labels: {advice['text']}"
    assert advice["kind"] == "suspect"
    assert keys["dataset_name"] in line


def test_swapped_labels_reach_the_training(config: Any, tmp_path: Path) -> None:
    swapped = pairs(20).rename_columns({"chosen": "rejected", "rejected": "chosen"})
    swapped.to_json(tmp_path / "swapped.jsonl")
    runs = {
        "flipped": {"flip_rate": 1.0},
        "by hand": {"dataset_name": str(tmp_path / "swapped.jsonl")},
        "as they are": {},
    }
    losses = {}
    for name, changes in runs.items():
        out = tmp_path / name
        path = config(output_dir=str(out), save_strategy="no", max_steps=2, **changes)
        assert main(["dpo", "--config", path]) == 0
        history = json.loads((out / "trainer_state.json").read_text())["log_history"]
        losses[name] = [line["loss"] for line in history if "loss" in line]
    assert losses["flipped"] == losses["by hand"] != losses["as they are"]


def test_unusable_pairs_can_be_left_out(
    config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    same = {"prompt": "ash", "chosen": " bay", "rejected": " bay"}
    empty = {"prompt": "ash", "chosen": "", "rejected": " bay"}
    for name, rows in {"train": [same, *pairs(8), empty, same], "test": [*pairs(4), same]}.items():
        (data / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = config(
        dataset_name=str(data), drop_unusable_pairs=True, flip_rate=0.5, max_steps=2,
        eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    assert main(["dpo", "--config", path]) == 0
    printed = capsys.readouterr().out
    assert "train_dataset: 1 empty and 2 identical pairs left out" in printed
    assert "eval_dataset: 0 empty and 1 identical pairs left out" in printed
    assert "4 of 8 training labels swapped" in printed
    # All rows are those of the file.
    dropped = json.loads((tmp_path / "out" / "dropped_pairs.json").read_text())
    assert dropped == {"num_pairs": 11, "empty": [9], "identical": [0, 10]}
    swapped = json.loads((tmp_path / "out" / "label_flips.json").read_text())["rows"]
    assert swapped == [row + 1 for row in flipped_rows(8, 0.5)]


def test_lora_and_another_optimizer(config: Any, tmp_path: Path) -> None:
    lora = {"use_peft": True, "lora_r": 2, "lora_target_modules": ["q_proj", "v_proj"]}
    arguments = ["--optim", "adamw_torch", "--no_stop", "--max_steps", "2"]
    assert main(["dpo", "--config", config(**lora), *arguments]) == 0
    out = tmp_path / "out"
    assert (out / "adapter_model.safetensors").exists()
    assert not (out / "label_flips.json").exists()
    assert not (out / "poprisk_stop.json").exists()


def test_evaluation_pairs_of_a_file_of_their_own(config: Any, tmp_path: Path) -> None:
    pairs(8, seed=1).to_csv(tmp_path / "test.csv")
    options = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 2, "save_strategy": "no"}
    path = config(eval_dataset_name=str(tmp_path / "test.csv"), **options)
    assert main(["dpo", "--config", path]) == 0
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert any("eval_poprisk/margin_p50" in line for line in history)


def breaks(*args: Any, **kwargs: Any) -> None:
    raise ValueError("of no use")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("transformers.Trainer.save_state", "model; failed: trainer state: of no use"),
        ("poprisk_integrations.cli.dpo._report", "failed: summary: of no use"),
        ("transformers.trainer_callback.CallbackHandler.on_train_end", "failed: end of training"),
        ("transformers.Trainer.save_model", "trainer state; failed: model: of no use"),
    ],
)
def test_what_fails_after_training_costs_nothing_else(
    config: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    broken: str,
    message: str,
) -> None:
    """A status of its own, one line, and all that can be saved is."""
    monkeypatch.setattr(broken, breaks)
    path = config(max_steps=2, save_strategy="no", stop=False)
    assert main(["dpo", "--config", path]) == 1
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith(f"poprisk: trained; saved in {str(tmp_path / 'out')!r}: ")
    assert message in error[-1]
    assert (tmp_path / "out" / "model.safetensors").exists() is ("save_model" not in broken)
    assert (tmp_path / "out" / "trainer_state.json").exists() is ("save_state" not in broken)


def test_missing_extra(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("poprisk_integrations._imports.find_spec", lambda name: None)
    assert main(["dpo", "--config", "config.yaml"]) == 2
    assert "Run: pip install 'poprisk_integrations[trl]'" in capsys.readouterr().err

"""`poprisk clean` from a config to a model, cut and continued; what it refuses."""

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

from poprisk_integrations.cli.main import main
from poprisk_integrations.trl import FlipReport
from tests.helpers.tiny_dpo import easy_pairs, save_model

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # transformers 5.23 deprecates names that TRL 1.16 and transformers itself still use.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
]
PAIRS = 128


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The words of a config of a tiny local model and local data."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    easy_pairs(PAIRS).to_json(tmp_path / "pairs.jsonl")
    keys = {
        "model_name_or_path": save_model(tmp_path / "model"),
        "dataset_name": str(tmp_path / "pairs.jsonl"),
        "output_dir": str(tmp_path / "out"),
        "flip_rate": 0.25,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 8,
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        "stop": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(keys))
    return ["--config", str(path)]


def test_the_mean_of_the_folds_becomes_the_model(
    config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["clean", *config, "--folds", "2", "--min-probability", "0.5"]) == 0
    printed = capsys.readouterr().out
    assert f"{PAIRS} pairs in 2 folds: up to 1 times the training of the config" in printed
    assert "32 of 128 training labels swapped" in printed
    found = json.loads((tmp_path / "out" / "cleaning" / "poprisk_clean.json").read_text())
    assert found["study"]["auc"] > 0.75
    assert f"AUC {found['study']['auc']:.3f}" in printed
    assert f"mean of 2 models after {found['epochs'][0]}, {found['epochs'][1]} epochs" in printed
    cleaned = pd.read_parquet(tmp_path / "out" / "cleaning" / "cleaned.parquet")
    assert 0 < len(found["dropped"]) == PAIRS - len(cleaned)
    assert cleaned.columns.tolist() == ["prompt", "chosen", "rejected"]
    table = FlipReport.load(tmp_path / "out" / "cleaning").to_pandas()
    assert set(table["row"][table["probability_wrong"] >= 0.5]) == set(found["dropped"])
    saved = load_file(tmp_path / "out" / "model.safetensors")
    mean = load_file(tmp_path / "out" / "cleaning" / "mean.safetensors")
    assert mean
    assert all(torch.equal(saved[name], value) for name, value in mean.items())
    # Again: nothing is trained, and the same comes out.
    files = [tmp_path / "out" / "cleaning" / f"fold-{fold}.safetensors" for fold in range(2)]
    times = [file.stat().st_mtime_ns for file in files]
    assert main(["clean", *config, "--folds", "2", "--min-probability", "0.5"]) == 0
    assert [file.stat().st_mtime_ns for file in files] == times
    # Both commands read what is left, from the directory of the config, and ask for no more of it.
    capsys.readouterr()
    assert main(["flips", str(tmp_path / "out"), "--top", "0"]) == 0
    assert "poprisk clean" not in capsys.readouterr().out
    assert main(["report", str(tmp_path / "out")]) == 0
    assert "2 models judged the pairs that they had not seen" in capsys.readouterr().out
    html = (tmp_path / "out" / "poprisk_report.html").read_text(encoding="utf-8")
    assert f"<td>{PAIRS}</td><td>{len(cleaned)}</td>" in html
    assert "poprisk clean --config" not in html


def test_a_model_that_is_trained_anew_on_the_cleaned_pairs(
    config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["clean", *config, "--folds", "2", "--final", "retrain", "--max_steps", "8"]
    words += ["--min-probability", "0.5", "--save_steps", "4"]
    assert main(words) == 0
    kept = len(pd.read_parquet(tmp_path / "out" / "cleaning" / "cleaned.parquet"))
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 8
    assert len(FlipReport.load(tmp_path / "out")) == kept < PAIRS
    assert "8 of 8 steps" in capsys.readouterr().out
    # Cut after the fourth step: what is trained next are the other four.
    for name in ("checkpoint-8", "model.safetensors"):
        path = tmp_path / "out" / name
        path.rename(tmp_path / name)
    weights = load_file(tmp_path / "model.safetensors")
    assert main(words) == 0
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in weights.items())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--folds", "1"], "'1' must be an integer >= 2"),
        (["--folds", "500"], "Invalid --folds: 500. There are 128 pairs."),
        (["--min-probability", "1.5"], r"Invalid --min-probability: 1.5. Must be in \[0, 1\]."),
        (["--dataset_streaming", "true", "--flip_rate", "0"], "not streamed"),
    ],
    ids=["one-fold", "more-folds-than-pairs", "no-probability", "streamed"],
)
def test_what_is_refused_before_any_work(
    words: list[str], message: str, config: Any, tmp_path: Path, capsys: Any
) -> None:
    assert main(["clean", *config, *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("poprisk: ")
    assert re.search(message, line)
    assert not (tmp_path / "out").exists()

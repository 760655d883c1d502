"""Local files and directories, mixtures and splits, with no network."""

import json
from pathlib import Path

import pytest
from trl import DatasetMixtureConfig, ScriptArguments

from poprisk_integrations.cli.errors import UsageError
from poprisk_integrations.cli.preference_data import builder_for_file, load_preferences
from tests.helpers.tiny_dpo import pairs

ROWS = pairs(6).to_list()
NO_MIXTURE = DatasetMixtureConfig()


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    pairs(6).to_json(tmp_path / "a.jsonl")
    pairs(6).to_csv(tmp_path / "a.csv")
    pairs(6).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    (tmp_path / "folder").mkdir()
    pairs(6).to_json(tmp_path / "folder" / "train.jsonl")
    pairs(4, seed=1).to_json(tmp_path / "folder" / "test.jsonl")
    return tmp_path


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.json", "folder"])
def test_local_data(files: Path, name: str) -> None:
    script = ScriptArguments(dataset_name=str(files / name))
    train, evaluation = load_preferences(script, NO_MIXTURE, evaluate=False)
    assert train.to_list() == ROWS
    assert evaluation is None


def test_evaluation_split_of_a_folder(files: Path) -> None:
    script = ScriptArguments(dataset_name=str(files / "folder"))
    _, evaluation = load_preferences(script, NO_MIXTURE, evaluate=True)
    assert evaluation.to_list() == pairs(4, seed=1).to_list()


def test_mixture_wins_over_the_name(files: Path) -> None:
    source = {"path": "json", "data_files": str(files / "a.jsonl")}
    mixture = DatasetMixtureConfig(datasets=[source, source])
    train, _ = load_preferences(ScriptArguments(dataset_name="x"), mixture, evaluate=False)
    assert train.to_list() == ROWS * 2


def test_missing_split(files: Path) -> None:
    script = ScriptArguments(dataset_name=str(files / "a.jsonl"))
    with pytest.raises(UsageError, match="no split 'test'; found 'train'"):
        load_preferences(script, NO_MIXTURE, evaluate=True)


def test_what_cannot_be_read(files: Path) -> None:
    (files / "notes.txt").write_text("x")
    (files / "broken.json").write_text('{"prompt": ')
    with pytest.raises(UsageError, match=r"not a data file; known are \.csv, \.json"):
        builder_for_file(str(files / "notes.txt"))
    for name in (str(files / "broken.json"), "no-such/data"):
        with pytest.raises(UsageError, match="cannot load the data"):
            load_preferences(ScriptArguments(dataset_name=name), NO_MIXTURE, evaluate=False)

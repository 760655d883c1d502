"""Local files and directories, mixtures and splits, with no network."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from trl import DatasetMixtureConfig, ScriptArguments

from poprisk_integrations.cli.errors import UsageError
from poprisk_integrations.cli.preference_data import load_preferences
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


def test_what_is_nowhere(files: Path) -> None:
    with pytest.raises(UsageError, match="cannot load the data"):
        load(files, "no-such/data")
    for name in ("none.json", "a/b/c", "./none", "none-*.jsonl"):
        path = name if name.startswith(".") else str(files / name)
        with pytest.raises(UsageError) as error:
            load(files, path)
        assert str(error.value) == f"no such file or directory: {path!r}"


def test_a_pattern_takes_its_files_in_order(files: Path) -> None:
    pairs(2, seed=1).to_json(files / "b.jsonl")
    found = load(files, str(files / "*.jsonl"))
    assert found.to_list() == ROWS + pairs(2, seed=1).to_list()


def test_a_name_with_brackets_is_no_pattern(files: Path) -> None:
    for suffix in ("jsonl", "parquet"):
        (files / f"a.{suffix}").rename(files / f"a [1].{suffix}")
        assert load(files, str(files / f"a [1].{suffix}")).to_list() == ROWS


def test_evaluation_pairs_from_a_file_of_their_own(files: Path) -> None:
    script = ScriptArguments(dataset_name=str(files / "a.jsonl"))
    for name in (files / "folder" / "test.jsonl", files / "folder"):
        train, evaluation = load_preferences(script, NO_MIXTURE, evaluate=True, eval_name=str(name))
        assert train.to_list() == ROWS
        assert evaluation.to_list() == pairs(4, seed=1).to_list()


@pytest.mark.parametrize("streaming", [False, True])
def test_streamed_and_not(files: Path, streaming: bool) -> None:
    script = ScriptArguments(dataset_name=str(files / "a.csv"), dataset_streaming=streaming)
    train, _ = load_preferences(script, NO_MIXTURE, evaluate=False)
    assert list(train) == ROWS


def load(files: Path, name: str) -> Dataset:
    return load_preferences(ScriptArguments(dataset_name=name), NO_MIXTURE, evaluate=False)[0]

"""Texts, ids and numbers of a user's file arrive as they are in it, or are refused by name."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl import DatasetMixtureConfig, ScriptArguments

from poprisk_integrations.cli.errors import UsageError
from poprisk_integrations.cli.preference_data import load_preferences

Load = Callable[..., list[dict[str, Any]]]
AWKWARD = ["None", "NA", "null", "nan", "007", "1e5", "true", "2020-01-01", " x ", "a\r\nb", "1.50"]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Writes a file and reads it back as `poprisk dpo` does."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def write_and_load(name: str, content: str | bytes) -> list[dict[str, Any]]:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        script = ScriptArguments(dataset_name=str(path))
        data: Dataset = load_preferences(script, DatasetMixtureConfig(), evaluate=False)[0]
        return data.to_list()

    return write_and_load


def lines(*rows: Any) -> str:
    return "\n".join(map(json.dumps, rows))


@pytest.mark.parametrize("text", AWKWARD)
def test_a_column_of_text_that_looks_like_something_else(load: Load, text: str) -> None:
    rows = [{"id": text, "chosen": text, "rejected": text}] * 2
    cells = '"' + text + '"'
    assert load("a.csv", f"id,chosen,rejected\n{','.join([cells] * 3)}\n") == rows[:1]
    assert load("a.jsonl", lines(*rows)) == rows
    assert load("a.json", json.dumps(rows)) == rows


def test_long_ids_keep_every_digit(load: Load) -> None:
    number = 2**53 + 1
    assert load("a.csv", f"id,chosen\n{number},a\n,b\n") == [
        {"id": str(number), "chosen": "a"},
        {"id": None, "chosen": "b"},
    ]
    assert load("a.json", json.dumps([{"id": 2**62 + 1}, {"id": 1}])) == [
        {"id": 2**62 + 1},
        {"id": 1},
    ]


def test_weights_keep_every_digit(load: Load) -> None:
    rows = [{"w": 0.1234567890123456}, {"w": 1e-17}]
    assert load("a.json", json.dumps(rows)) == rows


def test_reference_log_probabilities_of_a_csv_file_are_numbers(load: Load) -> None:
    assert load("a.csv", "chosen,ref_chosen_logps\n7,-1.50\n") == [
        {"chosen": "7", "ref_chosen_logps": -1.5}
    ]


def test_cells_longer_than_the_csv_module_likes(load: Load) -> None:
    assert load("a.csv", f"chosen\n{'x' * 200_000}\n") == [{"chosen": "x" * 200_000}]


def test_messages_with_and_without_a_key(load: Load) -> None:
    messages = [{"role": "user", "content": "007"}, {"role": "tool", "content": "1e5", "name": "n"}]
    rows = [{"chosen": messages}, {"chosen": messages[:1]}]
    found = load("a.jsonl", lines(*rows))
    kept = [[{k: v for k, v in m.items() if v is not None} for m in r["chosen"]] for r in found]
    assert kept == [row["chosen"] for row in rows]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "\ufeffchosen,rejected\ncafé,b\n".encode()),
        ("a.csv", "chosen,rejected\r\n\r\ncafé,b\r\n".encode()),
        ("a.jsonl", '\ufeff{"chosen": "café", "rejected": "b"}\r\n\r\n'.encode()),
        ("a.JSONL.gz", gzip.compress('{"chosen": "café", "rejected": "b"}'.encode(), mtime=0)),
        ("a.csv.gz", gzip.compress("chosen,rejected\ncafé,b".encode(), mtime=0)),
    ],
)
def test_ways_to_write_the_same(load: Load, name: str, content: bytes) -> None:
    assert load(name, content) == [{"chosen": "café", "rejected": "b"}]


def test_a_line_separator_inside_text(load: Load) -> None:
    assert load("a.jsonl", '{"chosen": "a\u2028b"}\n{"chosen": "c"}') == [
        {"chosen": "a\u2028b"},
        {"chosen": "c"},
    ]


REFUSED: list[tuple[str, str | bytes, str]] = [
    ("a.jsonl", "", "is empty"),
    ("a.json", " \n", "is empty"),
    ("a.json", "[]", "has no rows"),
    ("a.csv", "", "is empty"),
    ("a.csv", "prompt,chosen,rejected\n", "has no rows"),
    ("a.jsonl", '{"a": 1}\n{"a": 2,}\n', "line 2, column 9: not JSON"),
    ("a.json", '[{"a": 1},\n {"a" 2}]', "line 2, column 7: not JSON"),
    ("a.json", '{"prompt": ', "line 1, column 12: not JSON"),
    ("a.json", '{\n "a": 1\n}', "is one object over several lines"),
    ("a.jsonl", '{"a": 1}\n[1]', "line 2 is '[1]', not an object"),
    ("a.json", '[{"a": 1}, "x"]', "entry 1 is 'x', not an object"),
    ("a.jsonl", '{"chosen": "a", "chosen": "b"}', "line 1: the key 'chosen' occurs twice"),
    ("a.jsonl", '{"a":' + "[" * 100_000, "line 1: nested too deeply"),
    ("a.json", "<!DOCTYPE html><html>", "is a web page"),
    ("a.jsonl", "version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    ("a.json", b"PAR1\x15\x04", "is a parquet file: name it .parquet"),
    ("a.csv", "prompt;chosen;rejected\na;b;c\n", "has one column, 'prompt;chosen;rejected'"),
    ("a.csv", "a,a\n1,2\n", "has two columns 'a'"),
    ("a.csv", "a,b\n1,2,3\n", "line 2 has 3 cells, the first 2"),
    ("a.csv", 'a,b\n1,2\n"1,2\n3,4\n', "lines 3 to the end: not CSV"),
    ("a.csv", "a,b\ncafé,2\n".encode("latin-1"), "line 2 is not UTF-8 (byte 0xe9)"),
    ("a.csv", "a,b\n1,2\n".encode("utf-16"), "is UTF-16, not UTF-8"),
    ("a.csv", "chosen,ref_chosen_logps\n7,x\n", "line 2: 'x' in column 'ref_chosen_logps'"),
    ("a.jsonl.gz", b"\x1f\x8bxx", "is not a whole gzip file"),
    ("a.parquet", b"PAR1xx", "is not a whole parquet file"),
    ("a.txt", "x", "is not a data file; known are .csv, .json"),
    ("a.jsonl", lines({"n": 1}, {"n": 2**64}), "row 1: column 'n' cannot be kept as it is"),
    ("a.jsonl", '{"a": "x"}\n{"a": "\\ud800"}', "row 1: column 'a' cannot be kept as it is"),
    ("a.jsonl", lines({"id": "a"}, {"id": "7"}, {"id": 7}), "row 1: column 'id'"),
]


@pytest.mark.parametrize(
    ("name", "content", "message"), REFUSED, ids=[f"{n}-{m[:24]}" for n, _, m in REFUSED]
)
def test_what_cannot_be_read_is_refused_by_name(
    load: Load, tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    with pytest.raises(UsageError) as error:
        load(name, content)
    assert message in str(error.value)
    assert repr(str(tmp_path / name)) in str(error.value)


def test_a_mixture_of_local_files_is_read_the_same_way(tmp_path: Path, load: Load) -> None:
    load("a.csv", "id,chosen\n007,None\n008,x\n")
    sources: list[Any] = [
        {"path": "csv", "data_files": str(tmp_path / "a.csv"), "split": "train[:1]"},
        {"path": "csv", "data_files": [str(tmp_path / "a.csv")], "columns": ["id", "chosen"]},
    ]
    mixture = DatasetMixtureConfig(datasets=sources)
    train, _ = load_preferences(ScriptArguments(dataset_name="x"), mixture, evaluate=False)
    first, second = {"id": "007", "chosen": "None"}, {"id": "008", "chosen": "x"}
    assert train.to_list() == [first, first, second]


def test_a_folder_is_read_the_same_way(tmp_path: Path, load: Load) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.csv").write_text("id,chosen\n007,None\n")
    train, test = load_preferences(
        ScriptArguments(dataset_name=str(folder)), DatasetMixtureConfig(), evaluate=True
    )
    assert train.to_list() == test.to_list() == [{"id": "007", "chosen": "None"}]

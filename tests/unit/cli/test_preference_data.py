"""Preference pairs from files, folders, patterns and mixtures: as they are, or refused by name."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trl import DatasetMixtureConfig, ScriptArguments

from poprisk_integrations.cli.errors import UsageError
from poprisk_integrations.cli.preference_data import load_preferences
from tests.helpers.tiny_dpo import pairs

Load = Callable[..., list[dict[str, Any]]]
AWKWARD = ["None", "NA", "null", "nan", "007", "1e5", "true", "2020-01-01", " x ", "a\r\nb", "1.50"]
ROWS, OTHERS = pairs(6).to_list(), pairs(4, seed=1).to_list()


@pytest.fixture(autouse=True)
def _there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Writes a file and reads it back as `poprisk dpo` does."""

    def write_and_load(name: str, content: str | bytes) -> list[dict[str, Any]]:
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return loaded(name)[0]

    return write_and_load


def loaded(name: str, mixture: Any = None, streaming: bool = False, **options: Any) -> list[Any]:
    """Rows of the training data and, where wanted, of the evaluation data."""
    script = ScriptArguments(dataset_name=name, dataset_streaming=streaming)
    options = {"evaluate": False, **options}
    found = load_preferences(script, mixture or DatasetMixtureConfig(), **options)
    return [None if data is None else list(data) for data in found]


def lines(*rows: Any) -> str:
    return "\n".join(map(json.dumps, rows))


@pytest.fixture
def files() -> None:
    pairs(6).to_json("a.jsonl")
    pairs(6).to_csv("a.csv")
    pairs(6).to_parquet("a.parquet")
    Path("a.json").write_text(json.dumps(ROWS))
    Path("folder").mkdir()
    for split, rows in {"train": ROWS, "test": OTHERS}.items():
        Path("folder", f"{split}.jsonl").write_text(lines(*rows))


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.json", "folder"])
def test_local_data(name: str, streaming: bool) -> None:
    assert loaded(name, streaming=streaming) == [ROWS, None]


@pytest.mark.usefixtures("files")
def test_evaluation_pairs() -> None:
    """Of the same folder, of a file of their own, or of another folder."""
    assert loaded("folder", evaluate=True) == [ROWS, OTHERS]
    for name in ("folder/test.jsonl", "folder"):
        assert loaded("a.jsonl", evaluate=True, eval_name=name) == [ROWS, OTHERS]
    with pytest.raises(UsageError, match="no split 'test'; found 'train'"):
        loaded("a.jsonl", evaluate=True)


@pytest.mark.usefixtures("files")
def test_a_pattern_takes_its_files_in_order_and_a_name_with_brackets_is_none() -> None:
    Path("b.jsonl").write_text(lines(*OTHERS))
    assert loaded("*.jsonl")[0] == ROWS + OTHERS
    for suffix in ("jsonl", "parquet"):
        Path(f"a.{suffix}").rename(f"a [1].{suffix}")
        assert loaded(f"a [1].{suffix}")[0] == ROWS


@pytest.mark.parametrize("name", ["none.json", "/a/b/c", "./none", "none-*.jsonl"])
def test_what_is_nowhere(name: str) -> None:
    with pytest.raises(UsageError, match="no such file or directory: ") as error:
        loaded(name)
    assert str(error.value).endswith(repr(name))
    with pytest.raises(UsageError, match="cannot load the data"):
        loaded("no-such/data")


@pytest.mark.parametrize("text", AWKWARD)
def test_a_column_of_text_that_looks_like_something_else(load: Load, text: str) -> None:
    rows = [{"id": text, "chosen": text, "rejected": text}] * 2
    cells = '"' + text + '"'
    assert load("a.csv", f"id,chosen,rejected\n{','.join([cells] * 3)}\n") == rows[:1]
    assert load("a.jsonl", lines(*rows)) == rows
    assert load("a.json", json.dumps(rows)) == rows


CAFE, LONG = [{"chosen": "café", "rejected": "b"}], 2**53 + 1
WEIGHTS, IDS = [{"w": 0.1234567890123456}, {"w": 1e-17}], [{"id": 2**62 + 1}, {"id": 1}]
READ: dict[str, tuple[str, str | bytes, list[dict[str, Any]]]] = {
    "a byte order mark": ("a.csv", "\ufeffchosen,rejected\ncafé,b\n", CAFE),
    "empty lines": ("a.csv", "chosen,rejected\r\n\r\ncafé,b\r\n", CAFE),
    "both in JSON": ("a.jsonl", '\ufeff{"chosen": "café", "rejected": "b"}\r\n\r\n', CAFE),
    "packed JSON": ("a.JSONL.gz", gzip.compress(lines(*CAFE).encode()), CAFE),
    "packed CSV": ("a.csv.gz", gzip.compress("chosen,rejected\ncafé,b".encode()), CAFE),
    "a long id in CSV": ("a.csv", f"id,a\n{LONG},x\n,y\n",
                         [{"id": str(LONG), "a": "x"}, {"id": None, "a": "y"}]),
    "a long id in JSON": ("a.json", json.dumps(IDS), IDS),
    "every digit of weights": ("a.json", json.dumps(WEIGHTS), WEIGHTS),
    "numbers of TRL in CSV": ("a.csv", "chosen,ref_chosen_logps\n7,-1.50\n",
                              [{"chosen": "7", "ref_chosen_logps": -1.5}]),
    "more than the csv module likes": ("a.csv", f"a\n{'x' * 200_000}\n", [{"a": "x" * 200_000}]),
    "a line separator inside text": ("a.jsonl", '{"a": "a\u2028b"}\n{"a": "c"}',
                                     [{"a": "a\u2028b"}, {"a": "c"}]),
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_files_are_read_as_they_are(load: Load, case: str) -> None:
    name, content, rows = READ[case]
    assert load(name, content) == rows


def test_messages_with_and_without_a_key(load: Load) -> None:
    messages = [{"role": "user", "content": "007"}, {"role": "tool", "content": "1e5", "name": "n"}]
    rows = [{"chosen": messages}, {"chosen": messages[:1]}]
    found = load("a.jsonl", lines(*rows))
    kept = [[{k: v for k, v in m.items() if v is not None} for m in r["chosen"]] for r in found]
    assert kept == [row["chosen"] for row in rows]


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
    load: Load, name: str, content: str | bytes, message: str
) -> None:
    with pytest.raises(UsageError) as error:
        load(name, content)
    assert message in str(error.value)
    assert repr(name) in str(error.value)


def test_mixtures_and_folders_are_read_the_same_way(load: Load) -> None:
    load("a.csv", "id,chosen\n007,None\n008,x\n")
    sources: list[Any] = [
        {"path": "csv", "data_files": "a.csv", "split": "train[:1]"},
        {"path": "csv", "data_files": ["a.csv"], "columns": ["id", "chosen"]},
    ]
    first, second = {"id": "007", "chosen": "None"}, {"id": "008", "chosen": "x"}
    mixture = DatasetMixtureConfig(datasets=sources)
    assert loaded("wins over the name", mixture)[0] == [first, first, second]
    Path("folder").mkdir()
    for split in ("train", "test"):
        Path("folder", f"{split}.csv").write_text("id,chosen\n007,None\n")
    assert loaded("folder", evaluate=True) == [[first], [first]]

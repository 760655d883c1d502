"""Which row is which pair, what is changed, and what the files hold afterwards."""

import datetime
import json
import math
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Features, Value, load_dataset
from trl import DatasetMixtureConfig, ScriptArguments

from poprisk_integrations.cli.errors import UsageError
from poprisk_integrations.cli.flips_data import (
    match_rows,
    plan_cleaning,
    swap_labels,
    write_data,
)
from poprisk_integrations.cli.preference_data import load_preferences
from poprisk_integrations.trl.flip_report import FlipReport
from poprisk_integrations.trl.pair_texts import excerpts

P = [0.2, 0.95, math.nan, 0.5, 0.35, 0.9]
ALL = range(len(P))
ROWS = [
    {"key": f"k{i}", "prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}", "n": i or None}
    for i in range(len(P))
]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def report(ids: Any = None, action: Any = None) -> FlipReport:
    return FlipReport(
        pair_id=range(len(P)) if ids is None else ids,
        row=range(len(P)),
        probability_wrong=P,
        margin=[-p for p in P],
        step=[0] * len(P),
        action=action,
    )


def data(order: Any = ALL) -> Dataset:
    return Dataset.from_list([ROWS[i] for i in order])


def test_rows_are_in_the_order_of_the_report() -> None:
    assert match_rows(report(), data()) == [1, 5, 3, 4, 0, 2]


def test_ids_are_looked_up() -> None:
    ids = [f"k{i}" for i in range(len(P))]
    shuffled = data([3, 0, 5, 1, 4, 2])
    rows = match_rows(report(ids), shuffled, "key")
    assert [shuffled[row]["key"] for row in rows] == ["k1", "k5", "k3", "k4", "k0", "k2"]


def test_ids_are_found_in_a_larger_data_set_and_across_types() -> None:
    text = Dataset.from_dict({"chosen": ["x"] * 8, "rejected": ["y"] * 8, "id": list("76543210")})
    assert match_rows(report(), text, "id") == [6, 2, 4, 3, 7, 5]


@pytest.mark.parametrize(
    ("ids", "dataset", "column", "message"),
    [
        (None, data(range(5)), None, "report is of 6 pairs, --dataset has 5"),
        (None, data([*ALL, 0]), None, "report is of 6 pairs, --dataset has 7"),
        (list("abcdef"), data(), None, r"ids of their own \(such as 'b'\).*--id-column.*'key'"),
        ([5, 4, 3, 2, 1, 0], data(), None, "ids of their own"),
        (list("abcdef"), data(), "id", r"Invalid --id-column: 'id'. The data set has \['key'"),
        (list("abcdef"), data(), "key", "6 of the report's 6 pairs .* are not in column 'key'"),
        (["k0", "k1", "k2", "k3", "k4", "z"], data(), "key", r"1 of .* \(such as 'z'\)"),
        (list("abcdef"), data([0, 0]), "key", "'k0' occurs twice in 'key'"),
        (None, data().remove_columns("rejected"), None, "no column 'rejected'; found"),
    ],
)
def test_a_report_of_other_data_is_refused(
    ids: Any, dataset: Dataset, column: str | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        match_rows(report(ids), dataset, column)


def with_texts(rows: list[int], dataset: Dataset) -> FlipReport:
    """A report of some rows of the data, with the first words of two of them."""
    return FlipReport(
        pair_id=rows,
        row=rows,
        probability_wrong=[1 - 0.1 * place for place in range(len(rows))],
        margin=[-1.0] * len(rows),
        step=[3] * len(rows),
        texts={row: excerpts(dataset[row]) for row in rows[:2]},
    )


def test_rows_dropped_before_training_are_known_by_their_texts() -> None:
    """Rows 0 and 3 were left out, and the others kept their numbers."""
    assert match_rows(with_texts([1, 2, 4, 5], data()), data()) == [1, 2, 4, 5]
    turned = swap_labels(data(), {1, 2})  # swapped on purpose after the report's texts were taken
    assert match_rows(with_texts([1, 2, 4, 5], turned), data()) == [1, 2, 4, 5]


@pytest.mark.parametrize(
    ("rows", "order"), [([1, 2, 4, 5], [5, 4, 3, 2, 1, 0]), ([*ALL], [1, 0, 2, 3, 4, 5])]
)
def test_data_in_another_order_are_refused_by_name(rows: list[int], order: list[int]) -> None:
    message = "has other texts than the flip report .* train with pair_id_column=NAME"
    with pytest.raises(UsageError, match=message):
        match_rows(with_texts(rows, data()), data(order))


def test_dropped_rows_without_texts_are_refused_and_the_way_out_is_named() -> None:
    gaps = FlipReport(
        pair_id=[1, 4], row=[1, 4], probability_wrong=P[:2], margin=[1, 1], step=[0, 0]
    )
    with pytest.raises(UsageError, match=r"report is of 2 pairs, --dataset has 6.*pair_id_column"):
        match_rows(gaps, data())


def test_a_missing_id_is_not_the_text_none() -> None:
    rows = [{**row, "key": key} for row, key in zip(ROWS, [None, *"abcde"], strict=True)]
    with pytest.raises(
        UsageError, match=r"1 of the report's 6 pairs \(such as 'None'\) are not in"
    ):
        match_rows(report(["None", *"abcde"]), Dataset.from_list(rows), "key")


def test_empty_texts_do_not_become_missing_ones(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": "c", "rejected": "r"}, {**ROWS[0], "prompt": ""}]
    names = ["prompt", "chosen", "rejected"]
    dataset = Dataset.from_list(rows).select_columns(names)
    with pytest.raises(
        UsageError, match="column 'prompt' has an empty text in row 1, which in CSV"
    ):
        write_data(dataset, tmp_path / "out.csv")
    write_data(dataset, tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text().splitlines()[1])["prompt"] == ""


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_awkward_texts_and_ids_are_read_back_byte_by_byte(tmp_path: Path, suffix: str) -> None:
    """By `poprisk dpo` and `poprisk flips`, which guess no types."""
    awkward = ["None", "NA", "null", "nan", "007", "1e5", "true", "2020-01-01", " x ", "a\r\nb"]
    awkward += ["\u00e9", "e\u0301", "a\u2028b", str(2**53 + 1), "a\rb", '"', "x,y", "\ufeffz"]
    rows = [{"id": f"{text}", "prompt": text, "chosen": f"{text}+", "rejected": text}
            for text in awkward]  # fmt: skip
    out = tmp_path / f"out{suffix}"
    write_data(Dataset.from_list(rows), out)
    script = ScriptArguments(dataset_name=str(out))
    loaded, _ = load_preferences(script, DatasetMixtureConfig(), evaluate=False)
    assert loaded.to_list() == rows
    of_these = FlipReport(
        pair_id=awkward,
        row=range(len(rows)),
        probability_wrong=[0.5] * len(rows),
        margin=[-1.0] * len(rows),
        step=[0] * len(rows),
    )
    of_these.save(tmp_path)
    found = FlipReport.load(tmp_path / "flip_report.csv")
    places = match_rows(found, loaded, "id")
    assert [rows[place]["id"] for place in places] == found.to_pandas()["pair_id"].tolist()


def test_as_many_pairs_of_other_rows_are_refused() -> None:
    other = FlipReport(
        pair_id=[0, 9], row=[0, 9], probability_wrong=P[:2], margin=[1, 1], step=[0, 0]
    )
    with pytest.raises(UsageError, match="same split, order and number of rows"):
        match_rows(other, data(range(2)))


@pytest.mark.parametrize(
    ("mode", "threshold", "dropped", "swapped"),
    [
        ("drop", 0.5, {1, 3, 5}, set()),
        ("drop", 0.0, {0, 1, 3, 4, 5}, set()),
        ("drop", 1.0, set(), set()),
        ("swap", 0.9, set(), {1, 5}),
        ("suggested", 0.0, {3}, {1, 5}),
    ],
)
def test_plan(mode: str, threshold: float, dropped: set[int], swapped: set[int]) -> None:
    rows = match_rows(report(), data())
    found = plan_cleaning(report(), rows, mode=mode, min_probability=threshold)
    assert found == (dropped, swapped)


def test_suggested_goes_by_the_column_alone() -> None:
    edited = report(action=["swap", "keep", "drop", "review", "too_long", "unseen"])
    rows = match_rows(edited, data())
    assert plan_cleaning(edited, rows, mode="suggested", min_probability=0) == ({2}, {0})


def test_swap_touches_nothing_else() -> None:
    extra = {"ref_chosen_logps": 1.0, "score_chosen": 5, "ref_rejected_logps": 2.0}
    before = Dataset.from_list([row | extra for row in ROWS])
    after = swap_labels(before, {1, 4})
    assert after.column_names == before.column_names
    assert after.features == before.features
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        expected = dict(old)
        if index in (1, 4):
            expected |= {"chosen": f"r{index}", "rejected": f"c{index}"}
            expected |= {"ref_chosen_logps": 2.0, "ref_rejected_logps": 1.0}
        assert new == expected
    assert swap_labels(before, set()) is before


def test_twice_swapped_conversations_are_as_before() -> None:
    def talk(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]

    rows = [{"chosen": talk(f"c{i}"), "rejected": talk(f"r{i}")} for i in range(4)]
    once = swap_labels(Dataset.from_list(rows), {0, 3})
    assert once[3] == {"chosen": rows[3]["rejected"], "rejected": rows[3]["chosen"]}
    assert once[1] == rows[1]
    assert swap_labels(once, {0, 3}).to_list() == rows


def test_completions_of_two_types_cannot_be_swapped() -> None:
    mixed = Dataset.from_dict({"chosen": ["a"], "rejected": [1]})
    with pytest.raises(UsageError, match="'chosen' and 'rejected' are of different types"):
        swap_labels(mixed, {0})
    text = Features({"chosen": Value("string"), "rejected": Value("large_string")})
    long = Dataset.from_dict({"chosen": ["a"], "rejected": ["b"]}, features=text)
    assert swap_labels(long, {0}).to_list() == [{"chosen": "b", "rejected": "a"}]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_written_file_gives_the_rows_back(tmp_path: Path, suffix: str) -> None:
    rows = [{**row, "n": (row["n"] or 0) + 2**60, "chosen": 'a "b",\nü'} for row in ROWS]
    out = tmp_path / f"out{suffix}"
    write_data(Dataset.from_list(rows), out)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [out.name]
    builder = {".jsonl": "json"}.get(suffix, suffix[1:])
    assert load_dataset(builder, data_files=str(out), split="train").to_list() == rows


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_missing_values_and_whole_numbers_stay(tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"out{suffix}"
    write_data(data(), out)
    builder = {".jsonl": "json"}.get(suffix, suffix[1:])
    found = load_dataset(builder, data_files=str(out), split="train").to_list()
    assert found == ROWS
    assert type(found[1]["n"]) is int


@pytest.mark.parametrize(
    ("suffix", "value", "message"),
    [
        (".csv", [{"role": "user"}], "column 'chosen' does not fit into CSV; use .jsonl"),
        (".csv", b"x", "column 'chosen' does not fit into CSV"),
        (".jsonl", b"x", "row 0 cannot be written as JSON .*; use .parquet"),
        (".jsonl", datetime.datetime(2020, 1, 1), "row 0 cannot be written as JSON"),
        (".jsonl", math.nan, "row 0 cannot be written as JSON"),
    ],
)
def test_what_a_format_cannot_hold(tmp_path: Path, suffix: str, value: Any, message: str) -> None:
    out = tmp_path / f"out{suffix}"
    out.write_text("before")
    with pytest.raises(UsageError, match=message):
        write_data(Dataset.from_list([{"chosen": value}]), out)
    assert out.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [out.name]

"""Order, actions, what is refused, and that a file gives back what was saved."""

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from poprisk_integrations.trl import FlipReport
from poprisk_integrations.trl.flip_report import DROP_AT, REVIEW_AT, SWAP_AT, suggested_actions

NAN = math.nan
COLUMNS: dict[str, Any] = {
    "pair_id": ["e", "d", "c", "b", "a"],
    "row": [4, 3, 2, 1, 0],
    "probability_wrong": [0.2, NAN, 0.7, 0.2, 0.95],
    "margin": [1.0, NAN, -1.0, 1.0, -3.0],
    "step": [2, -1, 1, 0, 0],
}
BOTH = pytest.mark.parametrize("suffix", [".csv", ".parquet"])
HEADER = "pair_id,row,probability_wrong,margin,step,action"


def report(**changes: Any) -> FlipReport:
    return FlipReport(**{**COLUMNS, **changes})


def with_ids(ids: Any) -> FlipReport:
    count = len(ids)
    return FlipReport(
        pair_id=ids,
        row=range(count),
        probability_wrong=[(index + 1) / (7 * count) for index in range(count)],
        margin=[-1.0 / (index + 3) for index in range(count)],
        step=[index // 2 for index in range(count)],
    )


def assert_comes_back(saved: FlipReport, folder: Path, suffix: str) -> FlipReport:
    names = [path.name for path in saved.save(folder)]
    assert sorted(names) == sorted(path.name for path in folder.iterdir())
    loaded = FlipReport.load(folder / f"flip_report{suffix}")
    pd.testing.assert_frame_equal(loaded.to_pandas(), saved.to_pandas(), check_exact=True)
    assert str(loaded) == str(saved)
    return loaded


def test_order_is_probability_then_row_and_unknown_last() -> None:
    table = report().to_pandas()
    assert table["pair_id"].tolist() == ["a", "c", "b", "e", "d"]
    assert table["row"].tolist() == [0, 2, 1, 4, 3]
    assert table["action"].tolist() == ["swap", "drop", "keep", "keep", "unseen"]
    assert table.index.tolist() == [0, 1, 2, 3, 4]
    assert report().top(2)["pair_id"].tolist() == ["a", "c"]
    assert report().top(99)["pair_id"].tolist() == ["a", "c", "b", "e"]
    assert len(report().top(0)) == 0


def test_tables_are_copies() -> None:
    table = report()
    whole, top = table.to_pandas(), table.top(3)
    whole["action"] = "drop"
    top["margin"] = 0.0
    pd.testing.assert_frame_equal(table.to_pandas(), report().to_pandas())


def test_a_threshold_belongs_to_the_stronger_action() -> None:
    assert (REVIEW_AT, DROP_AT, SWAP_AT) == (0.3, 0.5, 0.9)
    for at, actions in ((0.9, "swap drop"), (0.5, "drop review"), (0.3, "review keep")):
        assert suggested_actions([at, np.nextafter(at, 0)]) == actions.split()
    assert suggested_actions([0.0, 1.0, NAN]) == ["keep", "swap", "unseen"]


def test_summary_and_line() -> None:
    assert report(probability_wrong=[0.2, NAN, 0.75, 0.2, 0.95]).summary() == {
        "num_pairs": 5,
        "num_scored": 4,
        "num_not_judged": 0,
        "calibrated": True,
        "expected_wrong": pytest.approx(2.1),
        "actions": {
            "swap": 1, "drop": 1, "review": 0, "keep": 2, "not_judged": 0, "unseen": 1,
            "too_long": 0,
        },
    }  # fmt: skip
    line = "5 pairs, 2.1 wrong labels expected: 1 swap, 1 drop, 0 review, 2 keep, 1 unseen"
    assert str(report(probability_wrong=[0.2, NAN, 0.75, 0.2, 0.95])) == line


@BOTH
def test_given_actions_win_and_pairs_that_were_not_judged_are_never_on_top(
    tmp_path: Path, suffix: str
) -> None:
    actions = ["keep", "too_long", "swap", "review", "not_judged"]
    made = report(action=actions, probability_wrong=[0.2, NAN, 0.7, 0.2, NAN])
    assert made.to_pandas().sort_values("row", ascending=False)["action"].tolist() == actions
    assert made.summary()["num_not_judged"] == 1
    assert made.top(5)["pair_id"].tolist() == ["c", "b", "e"]
    assert_comes_back(made, tmp_path, suffix)


@BOTH
def test_a_ranking_suggests_no_change_and_says_that_it_is_one(tmp_path: Path, suffix: str) -> None:
    ranked = report(calibrated=False)
    assert set(ranked.to_pandas()["action"]) == {"review", "keep", "unseen"}
    assert ranked.summary()["expected_wrong"] is None
    assert "ranked by their margins alone" in str(ranked)
    loaded = assert_comes_back(ranked, tmp_path, suffix)
    assert loaded.calibrated is False
    assert "calibrated" not in loaded.to_pandas()


def test_shown_in_notebooks() -> None:
    html = with_ids(["<script>", "b"])._repr_html_()
    assert "&lt;script&gt;" in html
    assert "<script>" not in html
    assert "<table" in html
    assert "1 keep" in repr(with_ids([3]))


def test_arrays_and_tensors_are_columns_too() -> None:
    made = FlipReport(
        pair_id=np.arange(3),
        row=torch.arange(3),
        probability_wrong=torch.tensor([0.25, 0.5, NAN], dtype=torch.float64),
        margin=np.array([0.5, -0.5, NAN], dtype=np.float32),
        step=torch.zeros(3, dtype=torch.int64),
    )
    assert made.to_pandas()["pair_id"].tolist() == [1, 0, 2]


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("row", [0, 1], r"one length, not .*'row': 2"),
        ("pair_id", ["a", "b", "c", "a", "d"], "pair_id: 'a'. Must occur once"),
        ("pair_id", ["a", "b", "c", None, "d"], "pair_id: None. Must be text or an integer"),
        ("pair_id", ["a", 1, "b", "c", "d"], "some are text and some integers"),
        ("pair_id", [1.0, 2.0, 3.0, 4.0, 5.0], r"pair_id: 1\.0"),
        ("pair_id", [True, 2, 3, 4, 5], "pair_id: True"),
        ("pair_id", [2**63, -1, 3, 4, 5], "must fit 64 bits"),
        ("row", [0, 1, 2, 3, 3], "row: 3. Must occur once"),
        ("row", [0, 1, 2, 3, -1], "row: -1. Must be >= 0"),
        ("row", [0.0, 1.0, 2.0, 3.0, 4.0], "row: must be integers, not float64"),
        ("step", [0, 0, 0, 0, -2], "step: -2. Must be >= -1"),
        ("probability_wrong", [0.1, NAN, 1.01, 0.2, 0.3], r"probability_wrong: 1\.01. Must be"),
        ("probability_wrong", [0.1, NAN, -0.1, 0.2, 0.3], r"probability_wrong: -0\.1. Must be"),
        ("probability_wrong", [0.1, 0.2, 0.3, 0.2, 0.3], "There is no margin to it"),
        ("margin", [1.0, NAN, math.inf, 0.0, 0.0], "margin: inf. Must be finite"),
        ("margin", [1.0, 2.0, 3.0, 0.0, 0.0], "margin: 2.0. There is no step to it"),
        ("action", ["keep"] * 4 + ["delete"], "action: 'delete'. Must be one of swap, drop"),
    ],
)
def test_columns_that_are_refused(name: str, values: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        report(**{name: values})


IDS: dict[str, list[Any]] = {
    "what csv could spoil": ['"q"', "a,b", "x\ny", "x\r\ny\r", " ", "", " x ", "é\u2028\x0b"],
    "what readers like to change": ["NA", "None", "null", "nan", "true", "2020-01-01", "inf", "-0"],
    "digits": ["7", "007", "1e5", "-1", str(2**53 + 1)],
    "two forms of a letter": ["\u00e9", "e\u0301"],
    "integers": [5, 3, -2, 0],
    "uint64": [2**63 + 5, 1],
    "beyond float": [2**53 + 1, 2**53],
    "none": [],
}


@BOTH
@pytest.mark.parametrize("ids", IDS)
def test_ids_come_back(tmp_path: Path, ids: str, suffix: str) -> None:
    loaded = assert_comes_back(with_ids(IDS[ids]), tmp_path / "new" / "folder", suffix)
    assert [type(x) for x in loaded.to_pandas()["pair_id"]] == [type(x) for x in IDS[ids]]


@BOTH
def test_texts_of_some_pairs_come_back(tmp_path: Path, suffix: str) -> None:
    texts = {0: ('say "x",', "NA", "1e5"), 3: ("None", " a ", "007")}
    loaded = assert_comes_back(report(texts=texts), tmp_path, suffix).to_pandas()
    rows = loaded[loaded["chosen"] != ""].to_dict("records")
    assert {row["row"]: (row["prompt"], row["chosen"], row["rejected"]) for row in rows} == texts


def test_a_directory_prefers_parquet_and_takes_csv(tmp_path: Path) -> None:
    report().save(tmp_path)
    with_ids([1, 2]).save(tmp_path / "other")
    (tmp_path / "other" / "flip_report.csv").replace(tmp_path / "flip_report.csv")
    assert len(FlipReport.load(tmp_path)) == 5
    (tmp_path / "flip_report.parquet").unlink()
    assert len(FlipReport.load(tmp_path)) == 2


def test_a_csv_that_a_spreadsheet_saved_again(tmp_path: Path) -> None:
    """Its mark in front, no quotes, Windows line ends, a column more, another order."""
    path = tmp_path / "edited.csv"
    header = "note,row,pair_id,margin,probability_wrong,step,action"
    lines = [header, "look,1,p-1,-2,0.9,0,keep", ",0,p-0,,,-1,unseen", ""]
    path.write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    table = FlipReport.load(path).to_pandas()
    assert table["pair_id"].tolist() == ["p-1", "p-0"]
    assert table["action"].tolist() == ["keep", "unseen"]
    path.write_text(path.read_text(encoding="utf-8-sig").replace("p-", ""))
    assert FlipReport.load(path).to_pandas()["pair_id"].tolist() == [1, 0]
    for text in ("007", "1_000", "\u0663", "+5", str(2**64), " 7"):  # only look like integers
        path.write_text(f"{HEADER}\n{text},0,0.5,-1,0,keep\n8,1,0.2,1,0,keep\n", "utf-8")
        assert FlipReport.load(path).to_pandas()["pair_id"].tolist() == [text, "8"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"margin"', '"h"', "it has no column 'margin'"),
        (",0.95,", ",high,", "Invalid probability_wrong: 'high' is no float"),
        (",0.95,", ",1.95,", r"Invalid probability_wrong: 1\.95"),
        ('"a",0,', '"a",0.5,', r"Invalid row: '0\.5' is no int"),
        ('"a",0,', '"a","x,y",0,', "record 1 has 7 of 6 values"),
        ('"a",0,', '"a"b,0,', "is not a flip report"),
        ('"swap"', '"flip"', "Invalid action: 'flip'"),
    ],
)
def test_a_spoilt_csv_names_itself_in_one_line(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    path = report().save(tmp_path)[0]
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message) as caught:
        FlipReport.load(path)
    assert str(caught.value).startswith(f"{str(path)!r} is not a flip report: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("flip_report.parquet", b"no parquet", "is not a flip report: "),
        ("binary.csv", b"\xff\xfe\x00", "is not a flip report: "),
        ("empty.csv", b"", "no column 'pair_id'"),
        ("other.csv", b"chosen\na\n", "no column 'pair_id' and no column 'row'"),
        ("report.txt", b"", r"neither \.parquet nor \.csv"),
    ],
)
def test_other_files_are_no_reports(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        FlipReport.load(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_no_report_at_all(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no flip report at"):
        FlipReport.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no flip_report\.parquet or flip_report\.csv in"):
        FlipReport.load(tmp_path)


def test_a_failed_save_leaves_the_old_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report().save(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def half(self: pd.DataFrame, path: Path, **kwargs: Any) -> None:
        Path(path).write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(pd.DataFrame, "to_csv", half)
    with pytest.raises(OSError, match="disk full"):
        with_ids([1]).save(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_csv_is_plain(tmp_path: Path) -> None:
    """Readable by other programs: a header, standard quoting, empty where nothing is known."""
    with report().save(tmp_path)[0].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == HEADER.split(",")
    assert rows[0]["probability_wrong"] == "0.95"
    assert rows[-1]["probability_wrong"] == rows[-1]["margin"] == ""

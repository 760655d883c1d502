"""Order, actions, what is refused, and that a file gives back what was saved."""

import csv
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from poprisk_integrations.trl.flip_report import (
    ACTIONS,
    DROP_AT,
    REVIEW_AT,
    SWAP_AT,
    FlipReport,
    suggested_actions,
)

NAN = math.nan
COLUMNS: dict[str, Any] = {
    "pair_id": ["e", "d", "c", "b", "a"],
    "row": [4, 3, 2, 1, 0],
    "probability_wrong": [0.2, NAN, 0.7, 0.2, 0.95],
    "margin": [1.0, NAN, -1.0, 1.0, -3.0],
    "step": [2, -1, 1, 0, 0],
}
NASTY = ["007", '"q"', "a,b", "x\ny", "x\r\ny\r", " ", "", "NA", "nan", "é\u2028\x0b", "-1", "1e5"]


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


def test_order_is_probability_then_row_and_unknown_last() -> None:
    table = report().to_pandas()
    assert table["pair_id"].tolist() == ["a", "c", "b", "e", "d"]
    assert table["row"].tolist() == [0, 2, 1, 4, 3]
    assert table["step"].tolist() == [0, 1, 0, 2, -1]
    assert table["action"].tolist() == ["swap", "drop", "keep", "keep", "unseen"]
    assert table.index.tolist() == [0, 1, 2, 3, 4]
    assert table["margin"].tolist()[:4] == [-3.0, -1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("threshold", "at", "below"),
    [(SWAP_AT, "swap", "drop"), (DROP_AT, "drop", "review"), (REVIEW_AT, "review", "keep")],
)
def test_a_threshold_belongs_to_the_stronger_action(threshold: float, at: str, below: str) -> None:
    assert suggested_actions([threshold, np.nextafter(threshold, 0)]) == [at, below]


def test_ends_of_the_scale() -> None:
    assert suggested_actions([0.0, 1.0, NAN]) == ["keep", "swap", "unseen"]
    assert (REVIEW_AT, DROP_AT, SWAP_AT) == (0.3, 0.5, 0.9)


def test_given_actions_win() -> None:
    actions = ["keep", "too_long", "swap", "review", "drop"]
    table = report(action=actions).to_pandas().sort_values("row", ascending=False)
    assert table["action"].tolist() == actions


def test_summary_and_line() -> None:
    assert report().summary() == {
        "num_pairs": 5,
        "num_scored": 4,
        "num_not_judged": 0,
        "calibrated": True,
        "expected_wrong": pytest.approx(0.2 + 0.7 + 0.2 + 0.95),
        "actions": {"swap": 1, "drop": 1, "review": 0, "keep": 2, "not_judged": 0, "unseen": 1}
        | {"too_long": 0},
    }
    expected = "5 pairs, 2.0 wrong labels expected: 1 swap, 1 drop, 0 review, 2 keep, 1 unseen"
    assert re.sub(r"2\.\d", "2.0", str(report())) == expected
    assert list(report().summary()["actions"]) == list(ACTIONS)


def test_top_leaves_out_pairs_without_probability() -> None:
    assert report().top(2)["pair_id"].tolist() == ["a", "c"]
    assert report().top(99)["pair_id"].tolist() == ["a", "c", "b", "e"]
    assert len(report().top(0)) == 0


def test_tables_are_copies() -> None:
    table = report()
    whole, top = table.to_pandas(), table.top(3)
    whole["action"] = "drop"
    top["margin"] = 0.0
    pd.testing.assert_frame_equal(table.to_pandas(), report().to_pandas())


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
    ("changes", "message"),
    [
        ({"row": [0, 1]}, r"one length, not .*'row': 2"),
        ({"pair_id": ["a", "b", "c", "a", "d"]}, "pair_id: 'a' occurs more than once"),
        ({"pair_id": ["a", "b", "c", None, "d"]}, "pair_id: None. Must be text or an integer"),
        ({"pair_id": ["a", 1, "b", "c", "d"]}, "some are text and some integers"),
        ({"pair_id": [1.0, 2.0, 3.0, 4.0, 5.0]}, r"pair_id: 1\.0"),
        ({"pair_id": [True, 2, 3, 4, 5]}, "pair_id: True"),
        ({"pair_id": [2**63, -1, 3, 4, 5]}, "must fit 64 bits"),
        ({"row": [0, 1, 2, 3, 3]}, "row: 3 occurs more than once"),
        ({"row": [0, 1, 2, 3, -1]}, "row: -1. Must be >= 0"),
        ({"row": [0.0, 1.0, 2.0, 3.0, 4.0]}, "row: must be integers, not float64"),
        ({"step": [0, 0, 0, 0, -2]}, "step: -2. Must be >= -1"),
        ({"probability_wrong": [0.1, NAN, 1.01, 0.2, 0.3]}, r"probability_wrong: 1\.01. Must be"),
        ({"probability_wrong": [0.1, NAN, -0.1, 0.2, 0.3]}, r"probability_wrong: -0\.1. Must be"),
        ({"probability_wrong": [0.1, 0.2, 0.3, 0.2, 0.3]}, "There is no margin to it"),
        ({"margin": [1.0, NAN, math.inf, 0.0, 0.0]}, "margin: inf. Must be finite"),
        ({"margin": [1.0, 2.0, 3.0, 0.0, 0.0]}, "margin: 2.0. There is no step to it"),
        ({"action": ["keep"] * 4 + ["delete"]}, "action: 'delete'. Must be one of swap, drop"),
    ],
)
def test_columns_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        report(**changes)


@pytest.mark.parametrize(
    "ids",
    [NASTY, [5, 3, -2, 0], [2**63 + 5, 1], [2**53 + 1, 2**53], ["7", "8"], ["only"], []],
    ids=["text", "integers", "uint64", "beyond float", "digits", "one", "none"],
)
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_saved_and_loaded_is_the_same(tmp_path: Path, ids: list[Any], suffix: str) -> None:
    saved = with_ids(ids)
    paths = saved.save(tmp_path / "new" / "folder")
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [
        "flip_report.csv",
        "flip_report.parquet",
    ]
    (path,) = (path for path in paths if path.suffix == suffix)
    loaded = FlipReport.load(path).to_pandas()
    pd.testing.assert_frame_equal(loaded, saved.to_pandas(), check_exact=True)
    assert [type(x) for x in loaded["pair_id"].tolist()] == [type(x) for x in ids]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_what_is_missing_stays_missing(tmp_path: Path, suffix: str) -> None:
    saved = report(action=["keep", "too_long", "drop", "keep", "swap"])
    saved.save(tmp_path)
    loaded = FlipReport.load(tmp_path / f"flip_report{suffix}")
    pd.testing.assert_frame_equal(loaded.to_pandas(), saved.to_pandas(), check_exact=True)


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


def saved_csv(tmp_path: Path, old: str, new: str) -> Path:
    report().save(tmp_path)
    path = tmp_path / "flip_report.csv"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return path


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
    path = saved_csv(tmp_path, old, new)
    with pytest.raises(ValueError, match=message) as caught:
        FlipReport.load(path)
    assert str(caught.value).startswith(f"{str(path)!r} is not a flip report: ")
    assert "\n" not in str(caught.value)


def test_other_files_are_no_reports(tmp_path: Path) -> None:
    (tmp_path / "flip_report.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="is not a flip report: ") as caught:
        FlipReport.load(tmp_path)
    assert "\n" not in str(caught.value)
    pd.DataFrame({"chosen": ["a"]}).to_parquet(tmp_path / "data.parquet")
    with pytest.raises(ValueError, match=r"no column 'pair_id' and no column 'row'"):
        FlipReport.load(tmp_path / "data.parquet")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not a flip report"):
        FlipReport.load(tmp_path / "binary.csv")
    (tmp_path / "empty.csv").touch()
    with pytest.raises(ValueError, match="no column 'pair_id'"):
        FlipReport.load(tmp_path / "empty.csv")
    (tmp_path / "report.txt").touch()
    with pytest.raises(ValueError, match=r"neither \.parquet nor \.csv"):
        FlipReport.load(tmp_path / "report.txt")
    with pytest.raises(FileNotFoundError, match="no flip report at"):
        FlipReport.load(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no flip_report\.parquet or flip_report\.csv in"):
        FlipReport.load(tmp_path / "folder")


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
    report().save(tmp_path)
    with (tmp_path / "flip_report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["pair_id", "row", "probability_wrong", "margin", "step", "action"]
    assert rows[0]["probability_wrong"] == "0.95"
    assert rows[-1]["probability_wrong"] == rows[-1]["margin"] == ""


def test_a_ranking_suggests_no_change_and_says_that_it_is_one() -> None:
    ranked = report(calibrated=False)
    assert set(ranked.to_pandas()["action"]) == {"review", "keep", "unseen"}
    assert suggested_actions([0.95, 0.6, 0.1], calibrated=False) == ["review", "review", "keep"]
    assert ranked.summary()["expected_wrong"] is None
    assert "ranked by their margins alone" in str(ranked)
    assert "expected" not in str(ranked)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("calibrated", [True, False])
def test_the_files_say_whether_there_are_probabilities(
    tmp_path: Path, suffix: str, calibrated: bool
) -> None:
    saved = report(calibrated=calibrated)
    saved.save(tmp_path)
    loaded = FlipReport.load(tmp_path / f"flip_report{suffix}")
    assert loaded.calibrated is calibrated
    assert str(loaded) == str(saved)
    assert "calibrated" not in loaded.to_pandas()


def test_pairs_that_were_not_judged_are_counted_and_never_on_top() -> None:
    made = FlipReport(
        pair_id=["a", "b", "c"],
        row=[0, 1, 2],
        probability_wrong=[NAN, 0.1, 0.8],
        margin=[0.0, 1.0, -1.0],
        step=[0, 1, 1],
        action=["not_judged", "keep", "drop"],
    )
    assert made.top(3)["pair_id"].tolist() == ["c", "b"]
    assert made.to_pandas()["pair_id"].tolist()[-1] == "a"
    assert made.summary()["num_not_judged"] == 1
    assert str(made).endswith("1 not_judged")


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_texts_of_some_pairs_go_round(tmp_path: Path, suffix: str) -> None:
    texts = {0: ('say "x",', "NA", "1e5"), 3: ("None", " a ", "007")}
    saved = report(texts=texts)
    saved.save(tmp_path)
    loaded = FlipReport.load(tmp_path / f"flip_report{suffix}").to_pandas()
    pd.testing.assert_frame_equal(loaded, saved.to_pandas(), check_exact=True)
    found = {row["row"]: (row["prompt"], row["chosen"], row["rejected"])
             for row in loaded.to_dict("records") if row["chosen"]}  # fmt: skip
    assert found == texts


@pytest.mark.parametrize("text", ["007", "1_000", "\u0663", "+5", str(2**64), " 7"])
def test_ids_that_only_look_like_integers_stay_text(tmp_path: Path, text: str) -> None:
    """Saved again by a spreadsheet, which quotes nothing."""
    path = tmp_path / "edited.csv"
    header = "pair_id,row,probability_wrong,margin,step,action"
    path.write_text(f"{header}\n{text},0,0.5,-1,0,keep\n8,1,0.2,1,0,keep\n", encoding="utf-8")
    assert FlipReport.load(path).to_pandas()["pair_id"].tolist() == [text, "8"]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_ids_that_readers_like_to_change_survive(tmp_path: Path, suffix: str) -> None:
    ids = ["NA", "None", "null", "nan", "", "007", "1e5", "true", "2020-01-01", " x ", "a\r\nb"]
    ids += ["\u00e9", "e\u0301", "\u2028", str(2**53 + 1), "-0", "inf"]
    saved = with_ids(ids)
    saved.save(tmp_path)
    loaded = FlipReport.load(tmp_path / f"flip_report{suffix}")
    assert loaded.to_pandas()["pair_id"].tolist() == saved.to_pandas()["pair_id"].tolist()

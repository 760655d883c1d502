"""What is seen of suspect pairs, by `poprisk flips` and on the page of `poprisk report`.

Made-up flip reports and data: texts, rows as in the user's file, annotators, lengths, calibration.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from poprisk_integrations.cli.main import main
from poprisk_integrations.core.calibration import wilson_interval
from poprisk_integrations.trl import FlipReport
from poprisk_integrations.trl.pairs import drop_rows, source_rows
from tests.helpers.page_text import page_text

COUNT = 60
# Bob's labels are suspect, and so are those of long chosen answers; row 5 has no margin.
PROBABILITIES = [
    math.nan if i == 5 else 0.9 - i / 1000 if i % 3 == 1 else 0.1 for i in range(COUNT)
]
ROWS: list[dict[str, Any]] = [
    {
        "id": f"id-{i}",
        "who": ("ann", "bob", None)[i % 3],
        "prompt": f"ask {i}",
        "chosen": f"yes {i:02d}" + "!" * (10 if i % 3 == 1 else i % 3),
        "rejected": f"no {i:02d}",
    }
    for i in range(COUNT)
]


def save(folder: str = "run", rows: list[int] | None = None, **changes: Any) -> None:
    rows = list(range(COUNT)) if rows is None else rows
    p = [PROBABILITIES[row] for row in rows]
    columns: dict[str, Any] = {
        "pair_id": rows, "row": rows, "probability_wrong": p,
        "margin": [math.log((1 - x) / x) for x in p], "step": [-1 if x != x else 2 for x in p],
        **changes,
    }  # fmt: skip
    FlipReport(**columns).save(folder)


@pytest.fixture
def poprisk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Any]:
    """Runs a command on "run" and returns what it prints; its complaint if it fails."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", _touch)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text("\n".join(map(json.dumps, ROWS)))

    def run(command: str, *options: str, dataset: str | None = "data.jsonl") -> Any:
        data = () if dataset is None else ("--dataset", dataset)
        capsys.readouterr()
        status = main([command, "run", *data, *options])
        captured = capsys.readouterr()
        if status:
            assert captured.out == ""
            (line,) = [x for x in captured.err.splitlines() if x.startswith("poprisk: ")]
            return line
        return json.loads(captured.out) if "--json" in options else captured.out

    return run


def _touch(figure: Any, to: Any, **options: Any) -> None:
    """Pictures are looked at by other tests; SVGs become part of the page."""
    if options["format"] == "svg":
        to.write("<?xml?><svg></svg>")
    else:
        to.touch()


def page() -> str:
    return page_text(Path("run/poprisk_report.html").read_text(encoding="utf-8"))


def table(text: str, title: str) -> list[list[str]]:
    """Rows of the table below a caption of the page."""
    _, _, below = text.partition(f"table: {title}\n")
    lines = below.splitlines()
    end = next((n for n, line in enumerate(lines) if " | " not in line), len(lines))
    return [line.split(" | ") for line in lines[:end]]


# Texts, and which row is which pair.


def test_page_and_flips_show_the_same_texts_in_the_same_order(poprisk: Any) -> None:
    save()
    found = poprisk("flips", "--json")["top"]
    poprisk("report")
    head, *rows = table(page(), "The 20 most suspect pairs")
    assert head == [
        "pair", "probability wrong", "margin", "action", "prompt", "chosen", "rejected"
    ]  # fmt: skip
    assert [row[0] for row in rows] == [str(pair["pair_id"]) for pair in found]
    texts = [[pair[name] for name in ("prompt", "chosen", "rejected")] for pair in found]
    assert [row[4:] for row in rows] == texts
    assert texts[0] == ["ask 1", "yes 01!!!!!!!!!!", "no 01"]


def test_without_data_the_excerpts_of_the_report_are_shown(poprisk: Any) -> None:
    save(texts={1: ("kept?", "kept yes", "kept no")})
    poprisk("report", dataset=None)
    rows = table(page(), "The 20 most suspect pairs")
    assert rows[1][4:] == ["kept?", "kept yes", "kept no"]
    assert rows[2][4:] == ["", "", ""]
    assert "Suspect labels by" not in page()


def test_rows_are_those_of_the_users_file(poprisk: Any) -> None:
    """Rows 0 and 4 were dropped before training; ids are looked up, also in data in other order."""
    data = drop_rows(Dataset.from_list(ROWS), {0, 4})
    rows = source_rows(data)
    save(rows=rows, pair_id=data["id"][:])
    Dataset.from_list(ROWS[::-1]).to_json("turned.jsonl")
    for dataset in ("data.jsonl", "turned.jsonl"):
        top = poprisk("flips", "--id-column", "id", "--json", dataset=dataset)["top"]
        first = [(pair["pair_id"], pair["row"], pair["prompt"]) for pair in top[:2]]
        assert first == [("id-1", 1, "ask 1"), ("id-7", 7, "ask 7")]
        poprisk("report", "--id-column", "id", dataset=dataset)
        shown = [
            (row[0], row[1], row[5]) for row in table(page(), "The 20 most suspect pairs")[1:3]
        ]
        assert shown == [("id-1", "1", "ask 1"), ("id-7", "7", "ask 7")]
    assert "row 7  " in poprisk("flips", "--id-column", "id")
    # Without ids the first words of the texts tell whose rows these are.
    words = {row: (f"ask {row}", ROWS[row]["chosen"], ROWS[row]["rejected"]) for row in (1, 7)}
    save(rows=rows, texts=words)
    poprisk("report")
    shown = [(row[0], row[4]) for row in table(page(), "The 20 most suspect pairs")[1:3]]
    assert shown == [("1", "ask 1"), ("7", "ask 7")]


def test_a_study_shows_the_pairs_as_the_trainer_got_them(poprisk: Any) -> None:
    save()
    swaps = {"rows": [1, 2], "num_pairs": COUNT}
    Path("run/label_flips.json").write_text(json.dumps(swaps))
    poprisk("report")
    head, first, second = table(page(), "The 20 most suspect pairs")[:3]
    assert head[4] == "swapped on purpose"
    assert first[4:] == ["yes", "ask 1", "no 01", "yes 01!!!!!!!!!!"]
    assert second[4:] == ["no", "ask 4", "yes 04!!!!!!!!!!", "no 04"]


# Groups of pairs.

BOB = [PROBABILITIES[i] for i in range(COUNT) if i % 3 == 1]


def test_annotators_the_worst_first(poprisk: Any) -> None:
    save()
    groups = poprisk("flips", "--annotator-column", "who", "--json")["groups"]
    assert [(one["group"], one["pairs"]) for one in groups["annotator"]] == [
        ("bob", 20), ("ann", 20), ("(none)", 19)
    ]  # fmt: skip
    bob = groups["annotator"][0]
    mean = sum(BOB) / 20
    assert bob["suspects"] == 20
    assert bob["mean"] == pytest.approx(mean)
    assert (bob["low"], bob["high"]) == pytest.approx(wilson_interval(mean, 20))
    poprisk("report", "--annotator-column", "who")
    head, *rows = table(page(), "Suspect labels by annotator: all groups")
    assert head == ["annotator", "judged pairs", "suspects", "mean P(wrong)", "95 % interval"]
    assert rows[0] == [
        "bob",
        "20",
        "20",
        f"{bob['mean']:.3f}",
        f"{bob['low']:.3f} to {bob['high']:.3f}",
    ]
    assert "drawn: Dots with intervals. Mean P(wrong) of all pairs 0.3" in page()
    lines = poprisk("flips", "--annotator-column", "who").splitlines()
    (line,) = [line for line in lines if line.split()[:1] == ["bob"]]
    assert len(line.rstrip()) <= 80
    assert line.split() == ["bob", "20", "20", *rows[0][3:4], *rows[0][4].split()]


def test_thirds_by_length(poprisk: Any) -> None:
    save()
    groups = poprisk("flips", "--json")["groups"]
    assert [*groups] == ["length"]
    found = [(one["group"], one["pairs"], one["suspects"]) for one in groups["length"]]
    assert found == [("+1", 20, 0), ("+3", 19, 0), ("+11", 20, 20)]
    poprisk("report")
    assert [row[0] for row in table(page(), "Suspect labels by length: all groups")[1:]] == [
        "+1", "+3", "+11"
    ]  # fmt: skip


def test_equal_lengths_are_not_torn_apart(poprisk: Any) -> None:
    save()
    same = [{**row, "chosen": "yes", "rejected": "no!"} for row in ROWS]
    Path("same.jsonl").write_text("\n".join(map(json.dumps, same)))
    assert poprisk("flips", "--json", dataset="same.jsonl")["groups"] == {}
    half = [
        {**row, "chosen": "yes", "rejected": "no!" + "!" * (n > 38)} for n, row in enumerate(ROWS)
    ]
    Path("half.jsonl").write_text("\n".join(map(json.dumps, half)))
    found = poprisk("flips", "--json", dataset="half.jsonl")["groups"]["length"]
    assert [(one["group"], one["pairs"]) for one in found] == [("-1", 21), ("+0", 38)]


REFUSED = {
    "Invalid --annotator-column: 'whom'. The data set has [": ("--annotator-column", "whom"),
    "Row 1 has \"['bob']\"; must be text or a number.": ("--annotator-column", "several"),
    "Invalid --id-column: 'key'.": ("--id-column", "key"),
}


@pytest.mark.parametrize("command", ["flips", "report"])
@pytest.mark.parametrize("message", REFUSED)
def test_columns_that_do_not_fit_are_refused(poprisk: Any, message: str, command: str) -> None:
    save()
    rows = [{**row, "several": [row["who"] or "x"]} for row in ROWS]
    Path("data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert message in poprisk(command, *REFUSED[message])
    assert not Path("run/poprisk_report.html").exists()


def test_data_without_a_run_of_pairs_are_refused(poprisk: Any, capsys: Any) -> None:
    Path("run").mkdir()
    Path("run/trainer_state.json").write_text('{"log_history": [{"step": 1, "loss": 2.0}]}')
    assert "there is no flip report in 'run'" in poprisk("report")
    assert main(["report", "run", "other", "--dataset", "data.jsonl"]) == 2
    assert "Invalid --dataset: it is of one run" in capsys.readouterr().err
    needs = "needs --dataset: the data that the trainer got."
    for command in ("flips", "report"):
        assert needs in poprisk(command, "--annotator-column", "who", dataset=None)


# What to do next, and whether P(wrong) is right.


def test_what_to_do_is_the_same_everywhere(poprisk: Any) -> None:
    none = [min(p, 0.3) for p in PROBABILITIES]
    for changes, kind, words in (
        ({}, "suspect", "leave out the 20 labels"),
        ({"calibrated": False}, "not_told", "the margins do not tell how many labels are wrong"),
        ({"probability_wrong": none}, "none_suspect", "nothing: no label"),
        ({"probability_wrong": [math.nan] * COUNT}, "not_judged", "train longer"),
    ):
        save(**changes)
        advice = poprisk("flips", "--json", dataset=None)["advice"]
        assert advice["kind"] == kind
        assert words in advice["text"]
        assert f"Next: {advice['text']}." in poprisk("flips", dataset=None)
        poprisk("report", dataset=None)
        assert f"- What to do next: {advice['text'].replace('`', '')}." in page()  # code there


def test_calibration_of_a_study(poprisk: Any) -> None:
    save()
    assert poprisk("flips", "--json")["reliability"] is None
    swaps = {"rows": [*range(1, COUNT, 6), 0], "num_pairs": COUNT}  # half of Bob's, and one more
    Path("run/label_flips.json").write_text(json.dumps(swaps))
    found = poprisk("flips", "--json")
    full = [one for one in found["reliability"] if one["count"]]
    assert [(one["low"], one["count"], one["share"]) for one in full] == [
        (0.1, 39, 1 / 39), (0.8, 20, 0.5)
    ]  # fmt: skip
    mean = sum(BOB) / 20
    assert full[1]["predicted"] == pytest.approx(mean)
    assert [full[1]["share_low"], full[1]["share_high"]] == [*wilson_interval(0.5, 20)]
    error = (39 * (0.1 - 1 / 39) + 20 * (mean - 0.5)) / 59
    assert found["study"]["calibration_error"] == pytest.approx(error)
    assert f"calibration error {error:.3f} (0.0" in poprisk("flips")

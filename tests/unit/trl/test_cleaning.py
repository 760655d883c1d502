"""Which pairs `clean_pairs` leaves out or exchanges, and what it refuses."""

import math

import pytest
from datasets import Dataset

from poprisk_integrations.trl import FlipReport, clean_pairs
from poprisk_integrations.trl.pairs import drop_rows, source_rows

WRONG = [0.05, 0.95, 0.6, math.nan, 0.4]


def data():
    rows = range(len(WRONG))
    columns = {"chosen": [f"good {i}" for i in rows], "rejected": [f"bad {i}" for i in rows]}
    return Dataset.from_dict(columns)


def report(rows=(0, 1, 2, 3, 4), calibrated=True):
    return FlipReport(
        pair_id=list(rows),
        row=list(rows),
        probability_wrong=WRONG,
        margin=[math.nan if math.isnan(p) else 1 - 2 * p for p in WRONG],
        step=[-1 if math.isnan(p) else 1 for p in WRONG],
        calibrated=calibrated,
    )


@pytest.mark.parametrize(
    ("options", "dropped", "swapped", "expected"),
    [
        ({}, [1, 2], [], (0.05 + 0.4) / 2),
        ({"min_probability": 0.9}, [1], [], (0.05 + 0.6 + 0.4) / 3),
        ({"mode": "swap"}, [], [1, 2], (0.05 + 0.05 + 0.4 + 0.4) / 4),
        ({"mode": "suggested"}, [2], [1], (0.05 + 0.05 + 0.4) / 3),
    ],
    ids=["drop", "surer", "swap", "suggested"],
)
def test_what_is_done_to_suspects(options, dropped, swapped, expected):
    cleaned = clean_pairs(data(), report(), **options)
    assert (cleaned.dropped, cleaned.swapped) == (dropped, swapped)
    assert cleaned.expected_wrong == pytest.approx(expected)
    kept = [row for row in range(5) if row not in dropped]
    assert source_rows(cleaned.dataset) == kept
    for row, example in zip(kept, cleaned.dataset, strict=True):
        names = ("bad", "good") if row in swapped else ("good", "bad")
        assert (example["chosen"], example["rejected"]) == tuple(f"{n} {row}" for n in names)


def test_a_mere_ranking_is_cut_only_where_the_user_says():
    ranking = report(calibrated=False)
    untouched = clean_pairs(data(), ranking)
    assert (untouched.dropped, untouched.swapped, untouched.expected_wrong) == ([], [], None)
    assert len(untouched.dataset) == 5
    assert clean_pairs(data(), ranking, min_probability=0.9).dropped == [1]


def test_rows_are_those_of_the_users_file():
    whole = Dataset.from_dict({"chosen": list("abcdefg"), "rejected": list("tuvwxyz")})
    kept = drop_rows(whole, {0, 3})
    cleaned = clean_pairs(kept, report(rows=(1, 2, 4, 5, 6)))
    assert cleaned.dropped == [2, 4]
    assert source_rows(cleaned.dataset) == [1, 5, 6]
    assert cleaned.dataset["chosen"][:] == ["b", "f", "g"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "delete"}, "mode: 'delete'.*drop.*swap.*suggested"),
        ({"min_probability": 1.5}, r"min_probability: 1.5. Must be in \[0, 1\]"),
    ],
    ids=["mode", "probability"],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        clean_pairs(data(), report(), **options)


def test_reports_of_other_data_and_cuts_that_leave_nothing_are_refused():
    with pytest.raises(ValueError, match="some of which are not among the 5"):
        clean_pairs(data(), report(rows=(0, 1, 2, 3, 9)))
    one = FlipReport(pair_id=[0], row=[0], probability_wrong=[0.9], margin=[-1.0], step=[1])
    with pytest.raises(ValueError, match="No pair would be left"):
        clean_pairs(data().select([0]), one)

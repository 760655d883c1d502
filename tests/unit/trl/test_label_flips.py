"""Exact counts, fixed draws, nothing else touched."""

from typing import Any

import pytest
from datasets import Dataset

from poprisk_integrations.trl.label_flips import flip_preferences, flipped_rows, swap_labels
from tests.helpers.tiny_dpo import pairs


@pytest.mark.parametrize(
    ("num_rows", "rate", "count"),
    [(10, 0.0, 0), (10, 0.3, 3), (10, 0.25, 3), (10, 1.0, 10), (7, 0.5, 4), (0, 0.5, 0)],
)
def test_count_is_exact(num_rows: int, rate: float, count: int) -> None:
    rows = flipped_rows(num_rows, rate)
    assert len(set(rows)) == len(rows) == count
    assert rows == sorted(rows)


def test_draw_depends_on_the_seed_alone() -> None:
    assert flipped_rows(100, 0.3, seed=1) == flipped_rows(100, 0.3, seed=1)
    assert flipped_rows(100, 0.3, seed=1) != flipped_rows(100, 0.3, seed=2)


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_rate_outside_zero_and_one_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=r"flip_rate: .* Must be in \[0, 1\]"):
        flipped_rows(10, rate)


def test_only_the_labels_of_the_drawn_rows_change() -> None:
    before = pairs(20)
    after, rows = flip_preferences(before, 0.3, seed=4)
    assert rows == flipped_rows(20, 0.3, seed=4)
    expected = [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if index in rows else row
        for index, row in enumerate(before)
    ]
    assert list(after) == expected
    assert after.column_names == before.column_names


@pytest.mark.parametrize(
    ("row", "swapped"),
    [
        (
            {"chosen": "a", "rejected": "b", "ref_chosen_logps": 1.0, "ref_rejected_logps": 2.0},
            {"chosen": "b", "rejected": "a", "ref_chosen_logps": 2.0, "ref_rejected_logps": 1.0},
        ),
        (
            {"prompt_ids": [0], "chosen_ids": [1], "rejected_ids": [2, 3], "score": 7},
            {"prompt_ids": [0], "chosen_ids": [2, 3], "rejected_ids": [1], "score": 7},
        ),
    ],
)
def test_what_belongs_to_a_completion_goes_with_it(
    row: dict[str, Any], swapped: dict[str, Any]
) -> None:
    assert list(swap_labels(Dataset.from_list([row, row]), [1])) == [row, swapped]


def test_columns_of_two_types_are_refused() -> None:
    data = Dataset.from_dict({"chosen": ["a"], "rejected": [["b"]]})
    with pytest.raises(ValueError, match="cannot swap: 'chosen' and 'rejected' are of different"):
        swap_labels(data, [0])

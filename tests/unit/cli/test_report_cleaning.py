"""The table of a cleaned data set: what was wrong before, and what is wrong afterwards."""

from pathlib import Path

import pandas as pd
import pytest

from poprisk_integrations.cli.report.cleaning import Cleaning, before_and_after
from poprisk_integrations.cli.report.run import Run, Suspects


def run_of(dropped: set[str], swapped: set[str]) -> Run:
    """Six pairs; the labels of 0, 1 and 2 were swapped on purpose, that of 2 was not judged."""
    pairs = pd.DataFrame(
        {
            "row": ["0", "1", "3", "4", "5"],
            "probability_wrong": [0.9, 0.8, 0.7, 0.1, 0.0],
            "swapped": [True, True, False, False, False],
        }
    )
    cleaning = Cleaning(
        epochs=[2, 3], final="mean", num_pairs=6, dropped=frozenset(dropped),
        swapped=frozenset(swapped), expected_wrong=0.2, noise={"rate": 0.5}, noise_after={},
        groups={},
    )  # fmt: skip
    suspects = Suspects(pairs=pairs, num_pairs=6, actions={}, calibrated=True, num_swapped=3)
    return Run(name="run", directory=Path(), suspects=suspects, cleaning=cleaning)


@pytest.mark.parametrize(
    ("dropped", "swapped", "left"),
    [
        (set(), set(), 3),
        ({"0", "3"}, set(), 2),  # a wrong one is gone, and a right one with it
        (set(), {"0", "1"}, 1),
        (set(), {"0", "3"}, 3),  # one was put right, and another spoiled
        ({"1"}, {"0", "4"}, 2),
    ],
)
def test_wrong_labels_are_counted_before_and_after(dropped, swapped, left):
    rows = {name: values for name, *values in before_and_after(run_of(dropped, swapped))}
    assert rows["pairs"] == ["6", str(6 - len(dropped))]
    assert rows.get("labels exchanged", ["0", "0"]) == ["0", str(len(swapped))]
    assert rows["labels expected to be wrong"] == ["50.0%", "20.0%"]
    assert rows["labels swapped on purpose"] == ["3", str(left)]

"""Against scikit-learn on the pairs that have a probability."""

import json
import math
import random
from pathlib import Path

import pytest
from sklearn.metrics import precision_score, recall_score, roc_auc_score

from poprisk_integrations.cli.errors import UsageError
from poprisk_integrations.cli.flips_study import flips_found, load_swapped_rows
from poprisk_integrations.trl.flip_report import FlipReport


def report(probabilities: list[float], margins: list[float] | None = None) -> FlipReport:
    count = len(probabilities)
    return FlipReport(
        pair_id=[f"id{i}" for i in range(count)],
        row=range(count),
        probability_wrong=probabilities,
        margin=[-p for p in probabilities] if margins is None else margins,
        step=[-1 if math.isnan(p) else 0 for p in probabilities],
    )


def test_equals_scikit_learn() -> None:
    rng = random.Random(1)
    p = [math.nan if i % 10 == 0 else round(rng.random(), 1) for i in range(200)]
    swapped = {i for i in range(200) if rng.random() < (0.5 if math.isnan(p[i]) else p[i])}
    found = flips_found(report(p), swapped)
    seen = [i for i in range(200) if not math.isnan(p[i])]
    truth, scores = [i in swapped for i in seen], [p[i] for i in seen]
    flags = [score >= 0.5 for score in scores]
    assert found.auc == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
    assert found.precision == pytest.approx(precision_score(truth, flags), abs=1e-12)
    assert found.recall == pytest.approx(recall_score(truth, flags), abs=1e-12)
    assert (found.num_swapped, found.num_scored) == (len(swapped), 180)
    assert (found.swapped_scored, found.flagged) == (sum(truth), sum(flags))
    assert f"AUC {found.auc:.3f}; at 0.5 precision" in str(found)


def test_margins_rank_pairs_of_one_probability() -> None:
    margins = [0.5, -1.0, 0.5, -2.0, 3.0, 0.0]
    found = flips_found(report([0.0] * 6, margins), {0, 3, 5})
    truth = [i in {0, 3, 5} for i in range(6)]
    assert found.auc == pytest.approx(roc_auc_score(truth, [-margin for margin in margins]))
    assert found.flagged == 0
    # A probability comes first, whatever the margins say.
    assert flips_found(report([0.2, 0.1], [9.0, -9.0]), {0}).auc == 1.0


def test_what_is_not_defined_is_said_so() -> None:
    nothing = flips_found(report([0.1, 0.2]), set())
    assert math.isnan(nothing.auc)
    assert str(nothing).count("not defined") == 3
    assert nothing.to_json()["precision"] is None
    json.dumps(nothing.to_json(), allow_nan=False)
    assert flips_found(report([math.nan]), {0}).num_scored == 0


def test_no_file_is_no_study(tmp_path: Path) -> None:
    assert load_swapped_rows(tmp_path, report([0.1])) is None
    (tmp_path / "label_flips.json").write_text('{"rows": [1, 0], "num_pairs": 3, "flip_seed": 0}')
    assert load_swapped_rows(tmp_path, report([0.1, 0.2, 0.3])) == {0, 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no record of swapped labels"),
        ("[1]", "is no record of swapped labels"),
        ('{"rows": [0]}', "is no record of swapped labels"),
        ('{"rows": 3, "num_pairs": 2}', "is no record of swapped labels"),
        ('{"rows": [0], "num_pairs": 3}', "is of 3 pairs, the flip report of 2"),
        ('{"rows": [2], "num_pairs": 2}', "not of one run"),
    ],
)
def test_a_file_of_another_run_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "label_flips.json").write_text(text)
    with pytest.raises(UsageError, match=message):
        load_swapped_rows(tmp_path, report([0.1, 0.2]))

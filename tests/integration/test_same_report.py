"""What a stop leaves behind reads the same, whichever framework ran it."""

import pytest

from poprisk_integrations.core import diagnose
from tests.helpers.tiny_classifier import Classifier, dataset
from tests.integration.frameworks import FRAMEWORKS, make, run
from tests.integration.lightning import toy

pytestmark = toy.third_party_warnings

# What only one of them has: its own name for the kept checkpoint; clipping, which only Trainer
# does before a callback can look; why a callback was switched off.
THEIR_OWN = {
    "best_model_checkpoint", "best_model_path", "clipped_fraction", "clipping", "switched_off",
}  # fmt: skip
SETTINGS = {
    "criterion", "sit_out", "patience", "kappa", "threshold", "min_steps", "window", "action",
    "restore", "accumulator", "epoch_steps",
}  # fmt: skip


@pytest.mark.parametrize("criterion", ["signal", "risk"])
def test_reports_of_both_frameworks_are_alike(criterion, tmp_path):
    job = {"epochs": 8}
    if criterion == "risk":
        job |= {"net": Classifier(), "data": dataset(64, wrong=0.5), "batch": 8}
    reports = []
    for framework in FRAMEWORKS:
        stop = make(framework, criterion=criterion, window=8)
        reports.append(run(framework, tmp_path / framework, stop, **job).report)
    keys = [set(report) - THEIR_OWN for report in reports]
    assert keys[0] == keys[1]
    assert {"criterion", "stopped", "global_step", "reason", "diagnosis", "history"} <= keys[0]
    assert {frozenset(report["settings"]) for report in reports} == {frozenset(SETTINGS)}
    assert len({frozenset(row) for report in reports for row in report["history"]}) == 1
    for report in reports:
        assert len(report["history"]) > 2
        since = {} if criterion == "risk" else {"since": report["onset_step"]}
        assert report["diagnosis"] == str(diagnose(report["history"], **since))
        if criterion == "signal":
            assert report["stopped"]
            assert report["onset_at"] <= report["onset_step"] <= report["stop_step"]

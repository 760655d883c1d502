"""What a stop leaves behind reads the same, whichever framework ran it."""

import json

import pytest
import torch

from poprisk_integrations.core import diagnose

pytest.importorskip("transformers")
pytest.importorskip("lightning")

from poprisk_integrations.huggingface import PopRiskEarlyStoppingCallback
from poprisk_integrations.lightning import PopRiskEarlyStopping
from tests.helpers import tiny_trainer
from tests.integration.lightning import toy

# What only one of them has: its own name for the kept checkpoint; clipping, which only Trainer
# does before a callback can look; why a callback was switched off.
THEIR_OWN = {
    "best_model_checkpoint", "best_model_path", "clipped_fraction", "clipping", "switched_off",
}  # fmt: skip
SETTINGS = {
    "kappa", "threshold", "min_steps", "window", "action", "restore", "accumulator", "epoch_steps",
}  # fmt: skip


def report_of(framework, directory):
    if framework == "trainer":
        args = tiny_trainer.arguments(directory, num_train_epochs=12)
        tiny_trainer.train(args, PopRiskEarlyStoppingCallback(window=8))
        return json.loads((directory / "poprisk_stop.json").read_text())
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(directory)
    stop = PopRiskEarlyStopping(window=8)
    run = toy.trainer(directory, [stop], max_epochs=30, logger=logger, log_every_n_steps=8)
    run.fit(toy.Classifier(lambda p: torch.optim.AdamW(p, lr=3e-2)), toy.loader(64, 8))
    (path,) = directory.rglob("poprisk_stop.json")
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    return {f: report_of(f, tmp_path_factory.mktemp(f)) for f in ("trainer", "lightning")}


pytestmark = toy.third_party_warnings


def test_both_have_the_same_keys(reports):
    trainer, lightning = (set(report) - THEIR_OWN for report in reports.values())
    assert trainer == lightning
    assert {"stopped", "global_step", "reason", "diagnosis", "onset_at", "history"} <= trainer


def test_both_name_their_arguments_alike(reports):
    for report in reports.values():
        assert set(report["settings"]) == SETTINGS


def test_both_have_the_same_rows(reports):
    rows = [row for report in reports.values() for row in report["history"]]
    assert len({tuple(row) for row in rows}) == 1
    assert all(row["steps"] == 8 for row in rows)


@pytest.mark.parametrize("framework", ["trainer", "lightning"])
def test_the_diagnosis_follows_from_the_rows(reports, framework):
    report = reports[framework]
    assert report["stopped"]
    assert report["onset_at"] <= report["onset_step"] <= report["stop_step"]
    found = diagnose(report["history"], since=report["onset_step"])
    assert report["diagnosis"] == str(found)

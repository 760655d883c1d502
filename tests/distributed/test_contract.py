"""Cells of the contract that need two processes: under both frameworks they equal one process."""

from pathlib import Path

import pytest
import torch

from tests.helpers.tiny_classifier import Classifier, dataset
from tests.integration.frameworks import FRAMEWORKS, equal, gated, make, numbers, run, still
from tests.integration.lightning import toy

pytestmark = [*toy.third_party_warnings, pytest.mark.distributed]


def signal(framework, root):
    """To the stop, with accumulation and clipping."""
    ours = make(framework, criterion="signal", window=8, kappa=1.2)
    job = {"accumulate": 2, "clip": 0.5, "epochs": 20, "make_optimizer": gated}
    outcome = run(framework, root, ours, **job)
    return {
        "steps": outcome.steps,
        "rule": numbers(ours),
        "history": ours.history,
        "weights": outcome.weights,
    }


def risk(framework, root):
    """Nothing is learned, so the same examples lose the same whichever batch they are in."""
    ours = make(framework, criterion="risk", action="monitor", sit_out=0.25)
    net, data = Classifier(width=64), dataset(256, wrong=0.5)
    outcome = run(framework, root, ours, net=net, data=data, epochs=4, make_optimizer=still)
    return {"steps": outcome.steps, "history": ours.history}


def every_cell(rank, world_size, folder):
    """{(cell, framework): what it found}."""
    return {
        (cell.__name__, framework): cell(framework, Path(folder, f"{cell.__name__}-{framework}"))
        for cell in (signal, risk)
        for framework in FRAMEWORKS
    }


JOBS = {2: [every_cell]}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_stop_by_gradients_is_that_of_one_process(framework, results, tmp_path):
    one = signal(framework, tmp_path)
    first, second = (rank["signal", framework] for rank in results(2, every_cell))
    assert first["steps"] == second["steps"] == one["steps"] == one["rule"]["stop_step"]
    assert first["rule"] == second["rule"]
    assert first["history"] == second["history"]
    assert equal(first["weights"], second["weights"])
    assert len(first["history"]) == len(one["history"]) > 2
    for mine, theirs in zip(first["history"], one["history"], strict=True):
        known = {key: value for key, value in theirs.items() if value is not None}
        assert {key: mine[key] for key in known} == pytest.approx(known, rel=1e-3, abs=1e-5)
    for name, value in one["weights"].items():
        torch.testing.assert_close(first["weights"][name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_estimate_is_that_of_one_process(framework, results, tmp_path):
    one = risk(framework, tmp_path)
    first, second = (rank["risk", framework] for rank in results(2, every_cell))
    assert first["steps"] == second["steps"] == one["steps"]
    assert first["history"] == second["history"]
    assert len(first["history"]) == len(one["history"]) >= 4
    for mine, theirs in zip(first["history"], one["history"], strict=True):
        assert mine["step"] == theirs["step"]
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-5)
        # Where in the epoch an example is measured depends on its rank, and is corrected for.
        difference = mine["estimated_test_loss"] - theirs["estimated_test_loss"]
        assert abs(difference) < 0.5 * theirs["estimated_test_loss_se"]

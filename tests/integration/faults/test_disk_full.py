"""A write that fails half-way: the old file stays, nothing half-written has a final name.

RLIMIT_FSIZE stands for the full disk: it needs no rights, and also writers in C++ and Rust meet it.
"""

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from transformers import TrainerCallback

import poprisk_integrations.huggingface as hf
from poprisk_integrations.cli.errors import UsageError
from poprisk_integrations.cli.output import writing
from poprisk_integrations.diagnostics import GradientWindow
from poprisk_integrations.diagnostics.stop_report import write_report
from poprisk_integrations.huggingface.callbacks.windows import WINDOW_FILE, save_window
from poprisk_integrations.lightning import PopRiskEarlyStopping
from poprisk_integrations.lightning.callbacks.run_result import leave_report
from poprisk_integrations.trl.flip_report import FlipReport
from tests.helpers.tiny_trainer import arguments, train, weights
from tests.integration.lightning import toy
from tests.integration.lightning.test_resume import data

pytestmark = toy.third_party_warnings
FULL = (OSError, SafetensorError, RuntimeError, UsageError)


@contextmanager
def full_disk(limit: int = 64) -> Iterator[None]:
    """No file grows beyond `limit` bytes; Python ignores the signal and sees an error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


REPORT = {"reason": "x" * 5000, "history": []}


def _window(folder: Path) -> None:
    param = torch.nn.Parameter(torch.zeros(500))
    param.grad = torch.ones(500)
    window = GradientWindow(4)
    window.add([param])
    save_window(window, str(folder), step=1)


def _flips(folder: Path) -> None:
    rows = list(range(300))
    FlipReport(
        pair_id=rows,
        row=rows,
        probability_wrong=[0.5] * 300,
        margin=[0.1] * 300,
        step=rows,
    ).save(folder)


def _results(folder: Path) -> None:
    with writing(folder / "results.json") as path:
        path.write_text(json.dumps(REPORT))


WRITERS: dict[str, Callable[[Path], Any]] = {
    "poprisk_stop.json": lambda folder: write_report(str(folder), REPORT),
    "poprisk_stop.json of Lightning": lambda folder: leave_report(str(folder), REPORT),
    WINDOW_FILE: _window,
    "flip_report.csv": _flips,
    "results.json": _results,
}


@pytest.mark.parametrize("name", WRITERS)
def test_own_files(name: str, tmp_path: Path) -> None:
    path = tmp_path / name.partition(" ")[0]
    with pytest.raises(FULL), full_disk():
        WRITERS[name](tmp_path)
    assert not path.exists()
    path.write_text("old")
    with pytest.raises(FULL), full_disk():
        WRITERS[name](tmp_path)
    assert path.read_text() == "old"
    WRITERS[name](tmp_path)  # and it recovers, whatever was left behind
    assert path.stat().st_size > 64
    assert not [found for found in tmp_path.iterdir() if ".tmp" in found.name]


class _FullFrom(TrainerCallback):
    """The disk is full at the end of a step, before Trainer saves."""

    def __init__(self, step: int, limit: int) -> None:
        self.step, self.limit = step, limit

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, hard))


# Bytes at which weights, optimizer, and what comes after them no longer fit.
@pytest.mark.parametrize("limit", [100, 2000, 7000])
def test_trainer_resumes_from_the_checkpoint_before(tmp_path: Path, limit: int) -> None:
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 12}
    whole = train(
        arguments(tmp_path / "whole", **options),
        hf.PopRiskEarlyStoppingCallback(criterion="signal"),
    )
    args = arguments(tmp_path / "cut", **options)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(FULL):
            train(args, hf.PopRiskEarlyStoppingCallback(criterion="signal"), _FullFrom(8, limit))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    kept = hf.last_whole_checkpoint(tmp_path / "cut")
    assert kept == str(tmp_path / "cut" / "checkpoint-4")
    resumed = train(args, hf.PopRiskEarlyStoppingCallback(criterion="signal"), resume=kept)
    one, other = weights(whole.model), weights(resumed.model)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_lightning_keeps_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # half-written files lie there
    saver = toy.SaveAt(tmp_path, 4)
    trainer = toy.trainer(
        tmp_path,
        [PopRiskEarlyStopping(criterion="signal", window=8, action="monitor"), saver],
        max_epochs=1,
    )
    trainer.fit(toy.Classifier(toy.gated), data())
    good = saver.path.read_bytes()
    with pytest.raises(OSError, match="File too large"), full_disk(2000):
        trainer.save_checkpoint(saver.path)
    assert saver.path.read_bytes() == good
    torch.load(saver.path, weights_only=True)

"""Runs that are killed at random end as an uninterrupted one, bitwise; see `kill_drill.py`."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.helpers.torchrun import ROOT


def _drill(*options: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.faults.kill_drill", *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def _check(outcome: dict[str, Any], kills: int, cuts: int) -> None:
    assert outcome["problems"] == []
    assert outcome["killed"] == kills
    assert outcome["cut_in_a_write"] == cuts
    assert outcome["recovered"] == kills + cuts
    assert outcome["lost_steps"] == 0  # nothing of what was saved
    assert outcome["differing_runs"] == 0
    assert outcome["failed_lives"] == 0
    assert outcome["own_files_half_written"] == 0
    assert outcome["inside_a_save"] > 0


def test_a_few_kills() -> None:
    for outcome in _drill("huggingface", "lightning", "--kills", "4", "--cuts", "2"):
        _check(outcome, 4, 2)


@pytest.mark.slow
@pytest.mark.parametrize("job", ["huggingface", "lightning"])
def test_fifty_kills(job: str) -> None:
    (outcome,) = _drill(job, "--kills", "50", "--cuts", "20")
    _check(outcome, 50, 20)
    assert outcome["inside_a_save"] >= 20

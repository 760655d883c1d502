"""Runs that are killed at random end as an uninterrupted one, bitwise; see `kill_drill.py`.

`poprisk demo` does not resume: killed with SIGKILL, it leaves nothing half-written.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]


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


def _start(out: Path, scratch: Path) -> subprocess.Popen[bytes]:
    scratch.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "poprisk_integrations.cli", "demo", "--quick", "--out", str(out)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(scratch)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _processes_of_session(session: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # has ended meanwhile
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")
def test_a_demo_that_is_killed_and_run_again(tmp_path: Path) -> None:
    out, scratch, rng = tmp_path / "demo", tmp_path / "scratch", random.Random(0)
    for _ in range(3):
        demo = _start(out, scratch)
        time.sleep(rng.uniform(5, 40))
        ended_before = demo.poll() is not None
        demo.send_signal(signal.SIGKILL)
        demo.wait()
        deadline = time.monotonic() + 20
        while _processes_of_session(demo.pid) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not _processes_of_session(demo.pid)  # its workers do not train on
        if not ended_before:
            names = {path.name for path in out.iterdir()} if out.is_dir() else set()
            assert all(name.startswith(".") for name in names - {"results.json", "report.png"})
            if "results.json" in names:
                json.loads((out / "results.json").read_text())
    again = _start(out, scratch)
    assert again.wait(timeout=400) == 0
    assert json.loads((out / "results.json").read_text())["quick"] is True
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")

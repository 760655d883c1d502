"""`poprisk demo` killed with SIGKILL: it does not resume, and leaves nothing half-written."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.torchrun import ROOT

pytestmark = pytest.mark.slow


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


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")
def test_killed_and_run_again(tmp_path: Path) -> None:
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

"""One of two gloo ranks is killed in training: the other ends by itself, and the run resumes."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from poprisk_integrations.huggingface import last_whole_checkpoint
from tests.helpers.torchrun import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
SECONDS = 120  # in which the survivor must have ended; starting up takes most of it


def _start(out: Path, die_at: int) -> list[subprocess.Popen[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
    }
    command = [sys.executable, "-m", "tests.integration.faults.rank_job", str(out), str(die_at)]
    return [
        subprocess.Popen(
            command,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]


def _end(ranks: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    try:
        said = [rank.communicate(timeout=SECONDS)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, text) for rank, text in zip(ranks, said, strict=True)]


def test_the_other_rank_ends_and_the_run_resumes(tmp_path: Path) -> None:
    assert [code for code, _ in _end(_start(tmp_path / "whole", die_at=-1))] == [0, 0]

    start = time.monotonic()
    survivor, victim = _end(_start(tmp_path / "cut", die_at=13))
    assert time.monotonic() - start < SECONDS
    assert victim[0] == -signal.SIGKILL
    assert survivor[0] not in (0, -signal.SIGKILL)
    assert "Connection closed by peer" in survivor[1] or "Connection reset" in survivor[1]
    assert not (tmp_path / "cut" / "final.pt").exists()
    assert not (tmp_path / "cut" / "poprisk_stop.json").exists()
    assert not list((tmp_path / "cut").rglob("*.tmp*"))
    kept = last_whole_checkpoint(tmp_path / "cut")
    assert kept == str(tmp_path / "cut" / "checkpoint-10")

    assert [code for code, _ in _end(_start(tmp_path / "cut", die_at=-1))] == [0, 0]
    one, other = (torch.load(tmp_path / name / "final.pt") for name in ("whole", "cut"))
    assert one["step"] == other["step"] == 20
    assert one["stop"] == other["stop"]
    assert all(torch.equal(one["weights"][n], other["weights"][n]) for n in one["weights"])

"""Two gloo processes equal one process on the joined batch, and decide alike."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.huggingface_run import MID_WINDOW, run

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]


def _run_two_processes(out: Path, batch: int) -> list[str]:
    """Start both ranks as torchrun would, wait, and return what each wrote to stderr."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    ranks = []
    for rank in ("0", "1"):
        env = {**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.distributed.huggingface_run", str(out), str(batch)]
        pipe = subprocess.PIPE
        ranks.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=pipe, stderr=pipe))
    try:
        outputs = [rank.communicate(timeout=240)[1].decode() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, stderr in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, stderr[-3000:]
    return outputs


def _results(directory: Path, rank: int) -> tuple[dict, dict[str, torch.Tensor]]:
    verdict = json.loads((directory / f"rank{rank}.json").read_text())
    return verdict, load_file(directory / f"rank{rank}.safetensors")


def test_two_processes_equal_one_on_the_joined_batch(tmp_path):
    run(tmp_path / "one", batch=8)
    stderr = _run_two_processes(tmp_path, batch=4)
    one, weights = _results(tmp_path / "one", 0)
    (first, replica), (second, other) = (_results(tmp_path / "whole", rank) for rank in (0, 1))

    assert (one["world_size"], first["world_size"]) == (1, 2)
    assert first == second  # step, reason and every number that led to it
    assert one["stop_step"] is not None
    for key in ("steps", "stop_step", "onset_step", "windows", "best"):
        assert first[key] == one[key], key
    assert first["signal_ratio"] == pytest.approx(one["signal_ratio"], rel=1e-4)
    said = [text.count("poprisk: stopped at step") for text in stderr]
    assert said == [3, 0]  # three runs, one rank speaks

    assert all(torch.equal(replica[n], other[n]) for n in weights)
    difference = max((weights[n] - replica[n]).abs().max().item() for n in weights)
    assert difference < 1e-6

    for rank, verdict in ((0, first), (1, second)):
        resumed, resumed_weights = _results(tmp_path / "resumed", rank)
        assert resumed == verdict
        assert all(torch.equal(resumed_weights[n], replica[n]) for n in weights)

    # One process, then two: training time goes on, the unfinished window does not.
    grown = [_results(tmp_path / "grown", rank)[0] for rank in (0, 1)]
    assert grown[0] == grown[1]
    done = [tuple(row) for row in one["windows_at"] if row[0] <= MID_WINDOW]
    assert [tuple(row) for row in grown[0]["windows_at"]][: len(done)] == done
    assert grown[0]["windows_at"][len(done)][0] == MID_WINDOW + 8
    changes = "world size 1 -> 2, per-device batch size 8 -> 4"
    assert [text.count(f"resumed with {changes}") for text in stderr] == [1, 0]

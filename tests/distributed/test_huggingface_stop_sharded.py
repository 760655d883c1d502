"""The stop under FSDP2 and ZeRO 1, 2, 3: two processes measure what one does, and decide alike."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import huggingface_stop_run as worker

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
STRATEGIES = ("fsdp2", "zero1", "zero2", "zero3")


def run_two_processes(out, strategies):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", worker.__name__, str(out), *strategies]
    ranks = []
    for rank in ("0", "1"):
        env = {**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"}
        with (out / f"stderr{rank}").open("w") as pipe:
            ranks.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=pipe, stderr=pipe))
    try:
        codes = [rank.wait(timeout=300) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, code in enumerate(codes):
        assert code == 0, (out / f"stderr{rank}").read_text()[-4000:]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """{strategy: [rank 0's runs, rank 1's]}, both started once for all strategies."""
    out = tmp_path_factory.mktemp("stop_sharded")
    strategies = [s for s in STRATEGIES if HAS_DEEPSPEED or not s.startswith("zero")]
    run_two_processes(out, strategies)
    return {
        s: [json.loads((out / f"{s}-rank{rank}.json").read_text()) for rank in (0, 1)]
        for s in strategies
    }


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The same runs in one process on the joined batches."""
    return worker.run_all(tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("name", worker.RUNS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_equal_one(found, one, strategy, name):
    if strategy not in found:
        pytest.skip("DeepSpeed is not installed (it is in the test extra)")
    first, second = (rank[name] for rank in found[strategy])
    assert first["kind"] == ("FSDP" if strategy == "fsdp2" else "DEEPSPEED")
    assert first["world_size"] == 2
    assert first["state"] == second["state"]  # step, reason and every number that led to it
    assert first["history"] == second["history"]
    alone = one[name]
    for key in ("stop_step", "onset_step", "windows"):
        assert first["state"][key] == alone["state"][key]
    assert first["steps"] == alone["steps"]
    if name == "clipped":
        assert first["clipped"] == alone["clipped"] > 0.5
    else:
        assert first["state"]["stop_step"] == first["steps"]
        assert first["clipped"] is None
    for mine, theirs in zip(first["history"], alone["history"], strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            assert mine[key] == pytest.approx(value, rel=1e-3, abs=1e-6), key

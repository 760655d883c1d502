"""`optim="poprisk_adamw"` in Trainer under FSDP2 and ZeRO: two processes equal one."""

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed import huggingface_sharded_run as worker

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed (it is in the test extra)",
)
IN_DEFAULT_RUN = ("fsdp2", "zero3")


def _parameter(strategy):
    marks = [needs_deepspeed] if strategy.startswith("zero") else []
    marks += [] if strategy in IN_DEFAULT_RUN else [pytest.mark.slow]
    return pytest.param(strategy, marks=marks)


STRATEGIES = [_parameter(strategy) for strategy in worker.STRATEGIES]


def run_two_processes(strategy, out):
    """Start both ranks as torchrun would, wait, and return what each wrote."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", worker.__name__, strategy, str(out)]
    ranks = []
    for rank in ("0", "1"):
        env = {**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"}
        pipe = (out / f"stderr{rank}").open("w")
        ranks.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=pipe, stderr=pipe))
        pipe.close()
    try:
        codes = [rank.wait(timeout=240) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, code in enumerate(codes):
        assert code == 0, (out / f"stderr{rank}").read_text()[-4000:]
    return [torch.load(out / f"rank{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Results by strategy, each started once."""
    done = {}

    def start(strategy):
        if strategy not in done:
            done[strategy] = run_two_processes(strategy, tmp_path_factory.mktemp(strategy))
        return done[strategy]

    return start


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The same runs in one process on the joined batches."""
    torch.manual_seed(0)
    return worker.run_all(tmp_path_factory.mktemp("one"))


def largest_difference(left, right):
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_equal_one_and_resume_bitwise(started, one, strategy):
    ranks = started(strategy)
    numel = sum(w.numel() for w in one["whole"]["weights"].values())
    for name, alone in one.items():
        runs = [rank[name] for rank in ranks]
        for run in runs:
            assert (run["optimizer"], run["world_size"]) == ("PopRiskAdamW", 2)
            assert run["kind"] == ("FSDP" if strategy.startswith("fsdp2") else "DEEPSPEED")
            assert run["global_step"] == worker.STEPS
            assert run["steps"] == alone["steps"] == {float(worker.STEPS)}
            assert run["dev_steps"] == alone["dev_steps"] == {worker.STEPS - 1.0}
            assert largest_difference(run["weights"], alone["weights"]) < 1e-6
        # Sharded, with padding at most: no rank holds the noise of the whole model.
        held = [run["held"] for run in runs]
        assert numel <= sum(held) <= numel + 4
        assert max(held) < 0.7 * numel
    for rank in ranks:
        assert largest_difference(rank["resumed"]["weights"], rank["whole"]["weights"]) == 0.0
    assert largest_difference(one["finite"]["weights"], one["whole"]["weights"]) > 1e-3


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_finite_alpha_takes_the_global_batch(started, one, strategy):
    """Two ranks by two micro-batches of two examples."""
    expected = (worker.BATCH, worker.EXAMPLES)
    assert set(one["finite"]["sizes"]) == {expected}
    for rank in started(strategy):
        assert set(rank["finite"]["sizes"]) == {expected}


@pytest.mark.slow
def test_fsdp_asked_for_on_the_cpu_is_ddp(started, one):
    """A canary: once accelerate shards on the CPU, `gloo_is_an_accelerator` can go."""
    for rank in started(worker.ON_CPU):
        run = rank["whole"]
        assert run["kind"] == "MULTI_CPU"
        assert run["held"] == sum(w.numel() for w in run["weights"].values())
        assert largest_difference(run["weights"], one["whole"]["weights"]) < 1e-6

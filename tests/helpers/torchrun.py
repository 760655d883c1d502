"""Scenarios of a worker module in two processes started by torchrun."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import torch

from tests.helpers.leave import leave

ROOT = Path(__file__).resolve().parents[2]


def run_scenarios(worker, out):
    """{name: [rank 0's result, rank 1's]} of `worker.SCENARIOS`; processes start once for all."""
    names = [scenario.__name__ for scenario in worker.SCENARIOS]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*launch, worker.__file__, str(out), *names],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return {n: [torch.load(out / f"{n}-rank{r}.pt") for r in (0, 1)] for n in names}


def run_rank(scenarios, out, names):
    """In a worker: run the named scenarios, write this rank's results to `out`, exit."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for scenario in scenarios:
        if scenario.__name__ in names:
            result = scenario(Path(out), world_size)
            torch.save(result, Path(out) / f"{scenario.__name__}-rank{rank}.pt")
    leave()

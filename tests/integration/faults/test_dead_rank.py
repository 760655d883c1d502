"""One of two gloo ranks is killed in training: the other ends by itself, and the run resumes.

The file is its own script: a Trainer run of 20 steps in which rank 1 kills itself at a step,
`python -m tests.integration.faults.test_dead_rank OUT DIE_AT`.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import poprisk_integrations.huggingface as hf
from tests.helpers.leave import leave
from tests.helpers.tiny_trainer import arguments, train, weights

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
ROOT = Path(__file__).parents[3]
SECONDS = 120  # in which the survivor must have ended; starting up takes most of it


class _Dies(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def _rank(out: Path, die_at: int) -> None:
    torch.set_num_threads(1)
    resume = hf.last_whole_checkpoint(out)  # before any rank writes
    stop = hf.PopRiskEarlyStoppingCallback(criterion="signal", window=8, action="monitor")
    saves = {"save_strategy": "steps", "save_steps": 5}
    gloo = {"ddp_backend": "gloo", "ddp_timeout": 30}
    args = arguments(out, max_steps=20, num_train_epochs=16, **saves, **gloo)
    trainer = train(args, stop, _Dies(die_at), resume=resume)
    if args.process_index == 0:
        result = {
            "weights": weights(trainer.model),
            "stop": stop.stopping_state,
            "step": trainer.state.global_step,
        }
        torch.save(result, out / "final.tmp")
        os.replace(out / "final.tmp", out / "final.pt")
    torch.distributed.destroy_process_group()
    leave()


def _run(out: Path, die_at: int) -> list[tuple[int, str]]:
    """(exit status, what it said) of both ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", _rank.__module__, str(out), str(die_at)],
            env={**env, "RANK": rank, "LOCAL_RANK": rank},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        said = [rank.communicate(timeout=SECONDS)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, text) for rank, text in zip(ranks, said, strict=True)]


def test_the_other_rank_ends_and_the_run_resumes(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert [code for code, _ in _run(whole, die_at=-1)] == [0, 0]

    start = time.monotonic()
    survivor, victim = _run(cut, die_at=13)
    assert time.monotonic() - start < SECONDS
    assert victim[0] == -signal.SIGKILL
    assert survivor[0] not in (0, -signal.SIGKILL)
    assert "Connection closed by peer" in survivor[1] or "Connection reset" in survivor[1]
    for name in ("final.pt", "poprisk_stop.json", "*.tmp*"):
        assert not list(cut.rglob(name))
    assert hf.last_whole_checkpoint(cut) == str(cut / "checkpoint-10")

    assert [code for code, _ in _run(cut, die_at=-1)] == [0, 0]
    one, other = (torch.load(out / "final.pt") for out in (whole, cut))
    assert one["step"] == other["step"] == 20
    assert one["stop"] == other["stop"]
    assert all(torch.equal(one["weights"][n], other["weights"][n]) for n in one["weights"])


if __name__ == "__main__":
    _rank(Path(sys.argv[1]), int(sys.argv[2]))

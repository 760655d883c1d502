"""One rank of a Trainer run of 20 steps that kills itself, as rank 1, at a step.

python -m tests.integration.faults.rank_job OUT DIE_AT
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

import poprisk_integrations.huggingface as hf
from tests.helpers.leave import leave
from tests.helpers.tiny_trainer import arguments, train, weights


class _Dies(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    resume = hf.last_whole_checkpoint(out)  # before any rank writes
    stop = hf.PopRiskEarlyStoppingCallback(window=8, action="monitor")
    args = arguments(
        out,
        max_steps=20,
        num_train_epochs=16,
        save_strategy="steps",
        save_steps=5,
        ddp_backend="gloo",
        ddp_timeout=30,
    )
    trainer = train(args, stop, _Dies(int(sys.argv[2])), resume=resume)
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

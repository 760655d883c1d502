"""The recipe multi-gpu-launch as one rank of a launch: a whole run, and the same resumed.

accelerate launch --config_file FILE -m tests.distributed.launch_recipe_run OUT STRATEGY ...
torchrun -m tests.distributed.launch_recipe_run OUT STRATEGY ...

STRATEGY is ddp, fsdp2 or zero3. accelerate shards on accelerators only (see
`gloo_is_an_accelerator`); everything else is as a user runs it.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from tests.distributed.huggingface_sharded_run import gloo_is_an_accelerator, local_numel
from tests.helpers.leave import leave
from tests.helpers.recipe_script import load_script

MIDDLE = 4


def found_in(trainer):
    """What the run was made of."""
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return {
        "optimizer": type(optimizer).__name__,
        "kind": AcceleratorState().distributed_type.value,
        "world_size": trainer.args.world_size,
        "global_step": trainer.state.global_step,
        "held": sum(local_numel(state["exp_avg"]) for state in optimizer.state.values()),
    }


def run(out, strategy, arguments):
    torch.set_num_threads(1)
    pretend = contextlib.nullcontext()
    if strategy != "ddp":
        os.environ.update(ACCELERATE_TORCH_DEVICE="cpu", DS_ACCELERATOR="cpu")
        arguments += ["--use_cpu", "false", "--ddp_backend", "gloo"]
        pretend = gloo_is_an_accelerator(strategy)
    if strategy == "zero3":
        import deepspeed  # noqa: F401 - imports the next one

        # No compiler is asked for shared-memory collectives.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    script = load_script("multi-gpu-launch")
    Accelerator.end_training = lambda self: None  # the processes are needed once more
    whole = [*arguments, "--output_dir", str(out / "whole")]
    resumed = [*arguments, "--output_dir", str(out / "resumed")]
    resumed += ["--resume_from_checkpoint", str(out / "whole" / f"checkpoint-{MIDDLE}")]
    with pretend:
        runs = {"whole": script.main(whole), "resumed": script.main(resumed)}
    found = {name: found_in(trainer) for name, trainer in runs.items()}
    (out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
    leave()

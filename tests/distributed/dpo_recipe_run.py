"""`poprisk dpo` as one rank of an `accelerate launch`; writes what ran to OUT.

accelerate launch --config_file FILE -m tests.distributed.dpo_recipe_run OUT STRATEGY --config ...

STRATEGY is fsdp2, zero3, or ddp. accelerate shards on accelerators only (see
`gloo_is_an_accelerator`); everything else is as a user runs it.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from trl import DPOTrainer

from poprisk_integrations.cli.main import main
from tests.distributed.huggingface_sharded_run import gloo_is_an_accelerator, local_numel
from tests.helpers.leave import leave


def watch_training(found):
    """Note what a run is made of, as its training begins."""
    train = DPOTrainer.train

    def watched(self, *args, **kwargs):
        result = train(self, *args, **kwargs)
        optimizer = self.optimizer
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        found["optimizer"] = type(optimizer).__name__
        found["kind"] = AcceleratorState().distributed_type.value
        found["world_size"] = self.args.world_size
        found["held"] = sum(local_numel(s["exp_avg"]) for s in optimizer.state.values())
        return result

    DPOTrainer.train = watched


def run(out, strategy, arguments):
    torch.set_num_threads(1)
    pretend = contextlib.nullcontext()
    if strategy != "ddp":
        os.environ.update(ACCELERATE_TORCH_DEVICE="cpu", DS_ACCELERATOR="cpu")
        arguments += ["--use_cpu", "false", "--ddp_backend", "gloo"]
        pretend = gloo_is_an_accelerator(strategy)
    if strategy.startswith("zero"):
        import deepspeed  # noqa: F401 - imports the next one

        # No compiler is asked for shared-memory collectives.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    found = {}
    watch_training(found)
    with pretend:
        code = main(["--debug", "dpo", *arguments])
    (out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))
    return code


if __name__ == "__main__":
    leave(run(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))

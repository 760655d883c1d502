"""A recipe as one rank of a launch; writes what its training runs were made of.

accelerate launch --config_file FILE -m tests.distributed.recipe_run RECIPE OUT STRATEGY ...
torchrun -m tests.distributed.recipe_run RECIPE OUT STRATEGY ...

RECIPE is `dpo`, for `poprisk dpo`, or `launch`, for the script of multi-gpu-launch: a whole run,
and the same resumed. STRATEGY is ddp, fsdp2 or zero3. accelerate shards on accelerators only (see
`gloo_is_an_accelerator`); everything else is as a user runs it.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import Trainer

from poprisk_integrations.cli.main import main
from tests.distributed.sharded_trainer import gloo_is_an_accelerator, held, innermost
from tests.helpers.leave import leave
from tests.helpers.recipe_script import load_script

MIDDLE = 4


def watch_training(found):
    """Note what each run was made of, at its end."""
    train = Trainer.train

    def watched(self, *args, **kwargs):
        result = train(self, *args, **kwargs)
        found.append(
            {
                "optimizer": type(innermost(self.optimizer)).__name__,
                "kind": self.accelerator.distributed_type.value,
                "world_size": self.args.world_size,
                "global_step": self.state.global_step,
                "held": held(self.optimizer),
            }
        )
        return result

    Trainer.train = watched


def run(recipe, out, strategy, arguments):
    torch.set_num_threads(1)
    pretend = contextlib.nullcontext()
    if strategy != "ddp":
        arguments += ["--use_cpu", "false", "--ddp_backend", "gloo"]
        pretend = gloo_is_an_accelerator(strategy)
    found, code = [], 0
    watch_training(found)
    with pretend:
        if recipe == "dpo":
            code = main(["--debug", "dpo", *arguments])
        else:
            script = load_script("multi-gpu-launch")
            Accelerator.end_training = lambda self: None  # the processes are needed once more
            script.main([*arguments, "--output_dir", str(out / "whole")])
            middle = str(out / "whole" / f"checkpoint-{MIDDLE}")
            resumed = ["--output_dir", str(out / "resumed"), "--resume_from_checkpoint", middle]
            script.main([*arguments, *resumed])
    (out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))
    return code


if __name__ == "__main__":
    leave(run(sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4:]))

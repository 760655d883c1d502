"""One rank of Trainer runs with the stop under sharding strategies; writes what the test compares.

python -m tests.distributed.huggingface_stop_run OUT STRATEGY...
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState

import poprisk_integrations.huggingface as hf
from tests.distributed.huggingface_sharded_run import (
    TinyModelWithBlocks,
    gloo_is_an_accelerator,
    settings,
)
from tests.helpers.leave import leave
from tests.helpers.tiny_trainer import arguments, train

# name: changes of the training arguments
RUNS = {
    "unclipped": {"max_grad_norm": 0.0},
    "clipped": {"max_grad_norm": 0.5},
    "accumulated": {"max_grad_norm": 0.0, "gradient_accumulation_steps": 2, "optim": "adamw_torch"},
}
BATCH, WINDOW, EPOCHS = 8, 8, 12


def run(out, world_size, changes, **options):
    """Train to the stop; the verdict and every window of it."""
    batch = BATCH // world_size // changes.get("gradient_accumulation_steps", 1)
    args = arguments(
        out,
        per_device_train_batch_size=batch,
        num_train_epochs=EPOCHS,
        **{"optim_args": "gate_warmup=1000", "logging_steps": 6, **changes, **options},
    )
    if args.optim == "adamw_torch":
        args.optim_args = None
    stop = hf.PopRiskEarlyStoppingCallback(window=WINDOW)
    trainer = train(args, stop, model=TinyModelWithBlocks())
    return {
        "steps": trainer.state.global_step,
        "kind": trainer.accelerator.distributed_type.value,
        "world_size": args.world_size,
        "state": stop.stopping_state,
        "history": stop.progress.history,
        "clipped": trainer.state.log_history[-1].get("poprisk/clipped_fraction"),
    }


def run_all(out, world_size=1, **options):
    return {name: run(out / name, world_size, changes, **options) for name, changes in RUNS.items()}


def main(out, strategies):
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.update(ACCELERATE_TORCH_DEVICE="cpu", DS_ACCELERATOR="cpu")
    if any(s.startswith("zero") for s in strategies):
        import deepspeed  # noqa: F401 - imports the next one

        # No compiler is asked for shared-memory collectives.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    for strategy in strategies:
        with gloo_is_an_accelerator(strategy):
            found = run_all(out / strategy, int(os.environ["WORLD_SIZE"]), **settings(strategy))
        (out / f"{strategy}-rank{dist.get_rank()}.json").write_text(json.dumps(found))
        AcceleratorState._reset_state()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    leave()

"""One rank of a Trainer run with the stop; writes weights and verdict for the test to compare.

python -m tests.distributed.huggingface_run OUT BATCH
"""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import poprisk_integrations.huggingface as hf
from tests.helpers.leave import leave
from tests.helpers.tiny_trainer import arguments, train, weights

MID_WINDOW = 28


def run(out: Path, batch: int, resume: Path | None = None) -> None:
    """Train to the stop and write `rank<i>.safetensors` and `rank<i>.json` to `out`."""
    args = arguments(
        out,
        per_device_train_batch_size=batch,
        num_train_epochs=16,
        optim_args="alpha=0.02",  # a gate that stays open far enough for training time to pass
        save_strategy="steps",
        save_steps=MID_WINDOW,
        ddp_backend="gloo" if "RANK" in os.environ else None,
    )
    stop = hf.PopRiskEarlyStoppingCallback(window=8)
    trainer = train(args, stop, resume=None if resume is None else str(resume))
    rank = args.process_index
    save_file(weights(trainer.model), out / f"rank{rank}.safetensors")
    verdict = {
        "steps": trainer.state.global_step,
        "world_size": args.world_size,
        "best": trainer.state.best_global_step,
        **stop.stopping_state,
        "windows_at": [(row["step"], row["lr_sum"]) for row in stop.progress.history],
    }
    (out / f"rank{rank}.json").write_text(json.dumps(verdict))


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    directory, per_device_batch = Path(sys.argv[1]), int(sys.argv[2])
    run(directory / "whole", per_device_batch)
    # Outside the output directory, and in the middle of a window; then of a run of one process.
    run(directory / "resumed", per_device_batch, directory / "whole" / f"checkpoint-{MID_WINDOW}")
    alone = directory / "one" / f"checkpoint-{MID_WINDOW}"
    run(directory / "grown", per_device_batch, alone)
    torch.distributed.destroy_process_group()
    leave()

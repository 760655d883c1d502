"""Two gloo processes through Lightning's ModelParallelStrategy (FSDP2), without the stop.

Run with `python -m torch.distributed.run --standalone --nproc-per-node 2`, arguments: the output
directory and the names of scenarios. The test module runs the same fits in one process.
"""

import os
import sys
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader, DistributedSampler

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.distributed import is_dtensor
from poprisk_integrations.lightning import PopRiskOptimizer
from tests.distributed.lightning_worker import SaveAt, Sharded
from tests.helpers.torchrun import run_rank
from tests.integration.lightning import toy

# 4 steps per epoch. The checkpoint is at the end of one: Lightning starts a plain DataLoader anew.
EXAMPLES, BATCH, EPOCHS, MIDDLE = 128, 32, 4, 8
LR, DECAY = 1e-2, 0.1


class Seen(Callback):
    """The fit's optimizer, as it is while the trainer still has it."""

    def on_train_end(self, trainer, pl_module):
        (optimizer,) = trainer.optimizers
        named = list(pl_module.named_parameters())
        states = {name: optimizer.state[p] for name, p in named}
        self.seen = {
            "optimizer": type(optimizer).__name__,
            "dtypes": {(p.dtype, states[name]["exp_avg"].dtype) for name, p in named},
            "weights": {name: whole(p) for name, p in named},
            "noise": {name: whole(s["exp_dev_sq"]) for name, s in states.items()},
            "steps": {float(s["step"]) for s in states.values()},
            "dev_steps": {float(s["dev_step"]) for s in states.values()},
            "sharded": {is_dtensor(s["exp_dev_sq"]) for s in states.values()},
            "sizes": {(g["batch_size"], g["dataset_size"]) for g in optimizer.param_groups},
        }


def whole(tensor):
    return (tensor.full_tensor() if is_dtensor(tensor) else tensor).detach().clone()


def fit(root, world_size, make_optimizer, callbacks=(), ckpt_path=None, full=False, **kwargs):
    data = toy.noisy_data(EXAMPLES, toy.FLIPS)
    sampler = None
    if world_size > 1:
        kwargs["strategy"] = ModelParallelStrategy(
            data_parallel_size=world_size,
            tensor_parallel_size=1,
            save_distributed_checkpoint=not full,
            process_group_backend="gloo",
        )
        kwargs["devices"] = world_size
        # Lightning's own sampler would shuffle: here the ranks' batches join to one process's.
        kwargs["use_distributed_sampler"] = False
        sampler = DistributedSampler(data, world_size, int(os.environ["RANK"]), shuffle=False)
    seen = Seen()
    settings = {"max_epochs": EPOCHS, "gradient_clip_val": 0.5, **kwargs}
    trainer = toy.trainer(root, [*callbacks, seen], **settings)
    loader = DataLoader(data, batch_size=BATCH // world_size, sampler=sampler)
    trainer.fit(Sharded(make_optimizer), loader, ckpt_path=ckpt_path)
    return {"global_step": trainer.global_step, **seen.seen}


def by_module(params):
    return PopRiskAdamW(params, lr=LR, weight_decay=DECAY)


def by_callback(params):
    return torch.optim.AdamW(params, lr=LR, weight_decay=DECAY)


def whole_and_resumed(root, world_size, name, make_optimizer, callbacks=tuple, **settings):
    path = Path(root) / f"{name}-{world_size}.ckpt"
    whole_run = fit(
        root, world_size, make_optimizer, [*callbacks(), SaveAt(path, MIDDLE)], **settings
    )
    again = fit(root, world_size, make_optimizer, callbacks(), ckpt_path=path, **settings)
    return {"whole": whole_run, "resumed": again}


def module_32(root, world_size):
    return whole_and_resumed(root, world_size, "module_32", by_module)


def module_full_checkpoint(root, world_size):
    return whole_and_resumed(root, world_size, "module_full", by_module, full=True)


def module_bf16(root, world_size):
    settings = {"precision": "bf16-true"}
    return whole_and_resumed(root, world_size, "module_bf16", by_module, **settings)


def callback_32(root, world_size):
    return whole_and_resumed(
        root, world_size, "callback_32", by_callback, lambda: [PopRiskOptimizer()]
    )


def callback_bf16(root, world_size):
    settings = {"precision": "bf16-true"}
    return whole_and_resumed(
        root, world_size, "callback_bf16", by_callback, lambda: [PopRiskOptimizer()], **settings
    )


def finite(root, world_size):
    """The sizes are of the global batch, whatever the number of ranks."""
    sizes = {"alpha": "finite", "batch_size": BATCH, "dataset_size": EXAMPLES}
    return {"whole": fit(root, world_size, by_callback, [PopRiskOptimizer(**sizes)])}


SCENARIOS = (module_32, module_full_checkpoint, module_bf16, callback_32, callback_bf16, finite)


if __name__ == "__main__":
    run_rank(SCENARIOS, sys.argv[1], sys.argv[2:])

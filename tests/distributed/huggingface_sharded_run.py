"""One rank of Trainer runs under a sharding strategy; writes what the test compares.

python -m tests.distributed.huggingface_sharded_run STRATEGY OUT

STRATEGY is one of STRATEGIES, or fsdp2_asked_for_on_cpu: Trainer's own choice on the CPU.
accelerate shards on accelerators only (see `gloo_is_an_accelerator`); everything else is as a user
runs it.
"""

import contextlib
import os
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from accelerate.state import DistributedType, PartialState

import poprisk_integrations.huggingface  # noqa: F401 - registers the optimizer's name
from poprisk_integrations.distributed import is_dtensor
from tests.helpers.leave import leave
from tests.helpers.tiny_trainer import TinyModel, arguments, dataset, train

STEPS, MIDDLE, BATCH, EXAMPLES = 6, 3, 8, 64
STRATEGIES = ("fsdp2", "fsdp2_sharded_checkpoint", "zero2", "zero3", "zero3_offload")
ON_CPU = "fsdp2_asked_for_on_cpu"
FINITE = {"optim_args": "alpha=finite", "gradient_accumulation_steps": 2}


class TinyModelWithBlocks(TinyModel):
    """Names a class of modules to shard on its own, as models of transformers do."""

    _no_split_modules = ("LayerNorm",)


def run(out, batch, resume=None, **changes):
    """Six steps, with weight decay, clipping and a checkpoint in the middle."""
    args = arguments(
        out,
        per_device_train_batch_size=batch,
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=MIDDLE,
        weight_decay=0.1,
        **changes,
    )
    resume = None if resume is None else str(resume)
    data = dataset(EXAMPLES)
    return summary(train(args, model=TinyModelWithBlocks(), train_dataset=data, resume=resume))


def run_all(out, world_size=1, **changes):
    """A whole run, the same resumed in the middle, and one with alpha=finite."""
    batch = BATCH // world_size
    whole = run(out / "whole", batch, **changes)
    resumed = run(out / "resumed", batch, out / "whole" / f"checkpoint-{MIDDLE}", **changes)
    finite = run(out / "finite", batch // 2, **FINITE, **changes)
    return {"whole": whole, "resumed": resumed, "finite": finite}


def settings(strategy):
    """What a user sets for this strategy."""
    if strategy.startswith("fsdp2"):
        config = {"version": 2, "cpu_ram_efficient_loading": False}
        if strategy == "fsdp2_sharded_checkpoint":
            config["state_dict_type"] = "SHARDED_STATE_DICT"
        return {
            "use_cpu": strategy == ON_CPU,
            "ddp_backend": "gloo",
            "fsdp": True,
            "fsdp_config": config,
        }
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": int(strategy[4])},
    }
    if strategy.endswith("offload"):
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        config["zero_force_ds_cpu_optimizer"] = False
    return {"use_cpu": False, "deepspeed": config}


def gloo_is_an_accelerator(strategy):
    """Give ranks without an accelerator the gloo backend.

    PartialState._prepare_backend knows one for them only if cpu=True, and cpu=True switches FSDP
    and DeepSpeed off (AcceleratorState.__init__): FSDP is for MULTI_GPU and its like.
    """
    is_fsdp = strategy.startswith("fsdp2")
    kind = DistributedType.MULTI_GPU if is_fsdp else DistributedType.MULTI_CPU
    return mock.patch.object(PartialState, "_prepare_backend", return_value=("gloo", kind))


def summary(trainer):
    """Whole weights, and what this rank's optimizer holds."""
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    states = list(optimizer.state.values())
    model = trainer.model_wrapped
    named = list(getattr(model, "module", model).named_parameters())
    return {
        "optimizer": type(optimizer).__name__,
        "kind": trainer.accelerator.distributed_type.value,
        "world_size": trainer.args.world_size,
        "global_step": trainer.state.global_step,
        "weights": {name: whole_tensor(p) for name, p in named},
        "steps": {float(s["step"]) for s in states},
        "dev_steps": {float(s["dev_step"]) for s in states},
        "held": sum(local_numel(s["exp_dev_sq"]) for s in states),
        "sizes": [(g["batch_size"], g["dataset_size"]) for g in optimizer.param_groups],
    }


def local_numel(tensor):
    return (tensor.to_local() if is_dtensor(tensor) else tensor).numel()


def whole_tensor(param):
    if hasattr(param, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([param]):
            return param.detach().clone()
    return (param.full_tensor() if is_dtensor(param) else param).detach().clone()


def main(strategy, out):
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    pretend = contextlib.nullcontext()
    if strategy != ON_CPU:
        os.environ.update(ACCELERATE_TORCH_DEVICE="cpu", DS_ACCELERATOR="cpu")
        pretend = gloo_is_an_accelerator(strategy)
    if strategy.startswith("zero"):
        import deepspeed  # noqa: F401 - imports the next one

        # No compiler is asked for shared-memory collectives.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    with pretend:
        found = run_all(out, int(os.environ["WORLD_SIZE"]), **settings(strategy))
    torch.save(found, out / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    leave()

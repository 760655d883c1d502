"""Two gloo processes through Lightning: each rank writes what it saw of every scenario.

Run with `python -m torch.distributed.run --standalone --nproc-per-node 2`, arguments: the output
directory and the names of scenarios. The test module runs the same fits in one process.
"""

import os
import sys
import warnings

import torch
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch.utils.data import DataLoader, DistributedSampler

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.lightning import (
    PopRiskEarlyStopping,
    PopRiskLRCut,
    PopRiskMonitor,
    PopRiskOptimizer,
)
from tests.helpers.torchrun import run_rank
from tests.integration.lightning import toy

CLOSING_GATE = {"kappa": 1.2}  # it lets little time pass


class SaveAt(Callback):
    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


class Sharded(toy.Classifier):
    """FSDP2: every layer's parameters are DTensors."""

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        if self.device_mesh is not None:
            for layer in (self.net[0], self.net[2], self.net):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])


class Fsdp1OnCpu(FSDPStrategy):
    """Lightning's FSDP1 asks for a GPU; on the CPU it shards as well if the device is named."""

    def _setup_model(self, model):
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.fsdp.wrap import ModuleWrapPolicy

        return FullyShardedDataParallel(
            model,
            device_id=torch.device("cpu"),
            auto_wrap_policy=ModuleWrapPolicy({torch.nn.Linear}),
            use_orig_params=True,
        )


class WholeWeights(Callback):
    """FSDP1's weights, gathered while the module is still wrapped."""

    def on_train_end(self, trainer, pl_module):
        from torch.distributed.fsdp import FullyShardedDataParallel

        empty = [p.numel() == 0 for p in pl_module.parameters()]
        with FullyShardedDataParallel.summon_full_params(trainer.strategy.model):
            self.weights = {
                name.replace("_fsdp_wrapped_module.", ""): value.detach().clone()
                for name, value in pl_module.named_parameters()
            }
        self.holds_empty_shards = any(empty)


class RankDependentRate(toy.Classifier):
    """A scheduler fed with a number of one rank only, e.g. a metric logged without sync_dist."""

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        rank = self.global_rank
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.6 if step > 36 and rank == 1 else 1.0
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def fit(root, model, callbacks=(), ckpt_path=None, world_size=1, strategy=None, **kwargs):
    data = toy.noisy_data(256, toy.FLIPS)
    sampler = None
    if world_size > 1:
        kwargs["strategy"] = strategy or DDPStrategy(process_group_backend="gloo")
        kwargs["devices"] = world_size
        # Lightning's own sampler would shuffle: here the ranks' batches join to one process's.
        kwargs["use_distributed_sampler"] = False
        sampler = DistributedSampler(data, world_size, int(os.environ["RANK"]), shuffle=False)
    stop = PopRiskEarlyStopping(window=8, **kwargs.pop("stop", {}))
    trainer = toy.trainer(root, [stop, *callbacks], **{"max_epochs": 20, **kwargs})
    loader = DataLoader(data, batch_size=32 // world_size, sampler=sampler)
    trainer.fit(model, loader, ckpt_path=ckpt_path)
    return {
        "global_step": trainer.global_step,
        "stopped_step": stop.stopped_step,
        "onset_step": stop.onset_step,
        "reason": stop.stopping_reason,
        "rule": stop.state_dict()["rule"],
        "history": stop.history,
        "weights": model.state_dict(),
        "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
    }


def adamw(root, world_size):
    return fit(root, toy.Classifier(), world_size=world_size)


def gated(root, world_size):
    optimizer, settings = PopRiskOptimizer(), {"stop": CLOSING_GATE}
    return fit(root, toy.Classifier(), [optimizer], world_size=world_size, **settings)


def accumulated_and_clipped(root, world_size):
    """8 micro-batches by 3: the last step of an epoch is short."""
    settings = {"accumulate_grad_batches": 3, "gradient_clip_val": 0.3, "max_epochs": 40}
    settings["stop"] = CLOSING_GATE
    return fit(root, toy.Classifier(), [PopRiskOptimizer()], world_size=world_size, **settings)


def resumed(root, world_size):
    """Interrupted at the end of an epoch and in a window, and continued."""

    def model():
        return toy.Classifier(lambda params: PopRiskAdamW(params, lr=2e-2))

    path = root / f"resume-{world_size}.ckpt"
    settings = {"world_size": world_size, "limit_train_batches": 4, "max_epochs": 40}
    settings["stop"] = CLOSING_GATE
    whole = fit(root, model(), [SaveAt(path, 20)], **settings)
    again = fit(root, model(), ckpt_path=path, **settings)
    return {"whole": whole, "again": again}


def onset_restored(root, world_size):
    settings = {"stop": {"restore": "onset"}, "world_size": world_size}
    return fit(root / f"onset-{world_size}", toy.Classifier(), **settings)


def rank_dependent_rate(root, world_size):
    return fit(root, RankDependentRate(), world_size=world_size)


def min_epochs(root, world_size):
    return fit(root, toy.Classifier(), world_size=world_size, min_epochs=10)


def fsdp2(root, world_size, callbacks=(), ckpt_path=None):
    strategy = None
    if world_size > 1:
        strategy = ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"
        )
    result = fit(
        root,
        Sharded(),
        [PopRiskOptimizer(), PopRiskMonitor(1), *callbacks],
        ckpt_path,
        world_size=world_size,
        strategy=strategy,
        stop=CLOSING_GATE,
    )
    weights = result["weights"].items()
    result["weights"] = {k: w.full_tensor() if world_size > 1 else w for k, w in weights}
    return result


def fsdp2_resumed(root, world_size):
    """From a sharded checkpoint at the end of an epoch, where a window ends too."""
    path = root / f"fsdp2-{world_size}.ckpt"
    whole = fsdp2(root, world_size, [SaveAt(path, 24)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = fsdp2(root, world_size, ckpt_path=path)
    warned = any("starts afresh" in str(w.message) for w in caught)
    return {"whole": whole, "again": again, "warned": warned}


def fsdp1(root, world_size, make_optimizer=toy.adamw, **stop):
    whole = WholeWeights()
    strategy = Fsdp1OnCpu(process_group_backend="gloo") if world_size > 1 else None
    model, callbacks = toy.Classifier(make_optimizer), [whole] * (world_size > 1)
    result = fit(root, model, callbacks, world_size=world_size, strategy=strategy, stop=stop)
    if world_size > 1:
        result["weights"] = whole.weights
        result["holds_empty_shards"] = whole.holds_empty_shards
    return result


def fsdp1_gated(root, world_size):
    return fsdp1(root, world_size, toy.gated, **CLOSING_GATE)


def fsdp1_sampled(root, world_size):
    return fsdp1(root, world_size, accumulator="sample")


def lr_cut(root, world_size):
    """A rate at which steps overshoot, with momentum."""

    def overshooting(params):
        return torch.optim.SGD(params, lr=0.5, momentum=0.95)

    cut = PopRiskLRCut(window=8)
    model, settings = toy.Classifier(overshooting), {"stop": {"action": "monitor"}}
    result = fit(root, model, [cut], world_size=world_size, max_epochs=10, **settings)
    return {**result, "cuts": cut.cuts, "last_cut_step": cut.last_cut_step}


def uneven_shards(root, world_size):
    """Each rank has data of its own, 16 and 18 batches, and both take 4 of them an epoch."""
    data = toy.noisy_data(256 + 32 * int(os.environ["RANK"]), toy.FLIPS)
    stop = PopRiskEarlyStopping(action="monitor")
    trainer = toy.trainer(
        root,
        [stop, GradientAccumulationScheduler({0: 1, 20: 2})],
        strategy=DDPStrategy(process_group_backend="gloo"),
        devices=world_size,
        use_distributed_sampler=False,
        limit_train_batches=4,
        max_epochs=40,
    )
    trainer.fit(toy.Classifier(), DataLoader(data, batch_size=16, shuffle=True))
    return {"windows": [(row["step"], row["reused"]) for row in stop.history]}


SCENARIOS = (
    adamw,
    gated,
    accumulated_and_clipped,
    resumed,
    onset_restored,
    rank_dependent_rate,
    min_epochs,
    fsdp2,
    fsdp2_resumed,
    fsdp1,
    fsdp1_gated,
    fsdp1_sampled,
    lr_cut,
    uneven_shards,
)


if __name__ == "__main__":
    run_rank(SCENARIOS, sys.argv[1], sys.argv[2:])

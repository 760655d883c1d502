"""What a run of Lightning's trainer holds on each rank, for the tests of several processes."""

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import FSDPStrategy

from poprisk_integrations.distributed import is_dtensor
from tests.helpers.sharding_problem import fsdp1_weights, whole


class Watcher(Callback):
    """Whole weights, after each step if asked for, and what the optimizer holds at the end."""

    def __init__(self, every_step):
        self.every_step, self.after = every_step, {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        if self.every_step:
            self.after[trainer.global_step] = self.weights(trainer, pl_module)

    def on_train_end(self, trainer, pl_module):
        (optimizer,) = trainer.optimizers
        self.at_end = self.weights(trainer, pl_module)
        self.local_sizes = [p.numel() for p in pl_module.parameters()]
        named = {n: (p, optimizer.state.get(p, {})) for n, p in pl_module.named_parameters()}
        gated = {n: (p, state) for n, (p, state) in named.items() if "exp_avg_sq" in state}
        self.optimizer = {
            "type": type(optimizer).__name__,
            "dtypes": {(p.dtype, s["exp_avg"].dtype) for p, s in gated.values()},
            "counts": {float(s["step"]) for _, s in gated.values()},
            "is_sharded": {is_dtensor(s["exp_avg_sq"]) for _, s in gated.values()},
            "squares": {n: whole(s["exp_avg_sq"]) for n, (_, s) in gated.items()},
            "sizes": {(g.get("batch_size"), g.get("dataset_size")) for g in optimizer.param_groups},
        }

    @staticmethod
    def weights(trainer, pl_module):
        if isinstance(trainer.strategy, FSDPStrategy):
            return fsdp1_weights(trainer.strategy.model)
        return {name: whole(p) for name, p in pl_module.named_parameters()}

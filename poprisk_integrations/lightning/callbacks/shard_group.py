"""Over which processes FSDP1 shards the optimizer's plain tensors."""

from typing import Any

from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

from poprisk_integrations.lightning._upstream import Trainer, strategy_is

__all__ = ["plain_shard_group"]


def plain_shard_group(trainer: Trainer) -> Any:
    """Process group of the shards under FSDPStrategy; None where tensors are whole or DTensors.

    Args:
        trainer: Fitting, so that the strategy has wrapped the module.
    """
    if not strategy_is(trainer, "FSDPStrategy"):
        return None
    for module in trainer.strategy.model.modules():  # type: ignore[union-attr]
        if isinstance(module, FullyShardedDataParallel):
            is_whole = module.sharding_strategy is ShardingStrategy.NO_SHARD
            return None if is_whole else module.process_group
    return None

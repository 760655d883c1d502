"""Gate statistics of PopRiskAdamW under Trainer."""

from typing import Any

from poprisk_integrations.distributed import is_dtensor, mean_over_ranks
from poprisk_integrations.optim import PopRiskAdamW

__all__ = ["gate_metrics", "sample_gate_stats", "unwrap_optimizer"]


def unwrap_optimizer(optimizer: Any) -> Any:
    """The optimizer under the wrappers of accelerate and DeepSpeed."""
    while not isinstance(optimizer, PopRiskAdamW) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def sample_gate_stats(optimizer: Any, every_n_steps: int, *, override: bool) -> bool:
    """Switch sampling on.

    Args:
        optimizer: Any optimizer, wrapped or not.
        every_n_steps: Optimizer steps between samples.
        override: Whether to change groups that sample already.

    Returns:
        Whether the optimizer has a gate.
    """
    optimizer = unwrap_optimizer(optimizer)
    if not isinstance(optimizer, PopRiskAdamW):
        return False
    for group in optimizer.param_groups:
        if override or not group["collect_stats_every"]:
            group["collect_stats_every"] = every_n_steps
    return True


def gate_metrics(optimizer: Any) -> dict[str, float]:
    """Totals of the last sample as `poprisk/<name>`; empty for other optimizers.

    Every rank must call it: shards of a tensor are added over ranks.
    """
    optimizer = unwrap_optimizer(optimizer)
    if not isinstance(optimizer, PopRiskAdamW):
        return {}
    sums = None
    if any(is_dtensor(p) for group in optimizer.param_groups for p in group["params"]):
        sums = mean_over_ranks(optimizer.gate_sums())
    stats = optimizer.gate_stats(sums)
    return {f"poprisk/{name}": float(v) for name, v in stats.items() if "/" not in name}

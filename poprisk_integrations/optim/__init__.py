"""The optimizer and its parameter groups."""

from poprisk_integrations.optim.param_groups import param_groups
from poprisk_integrations.optim.poprisk_adamw import PopRiskAdamW

__all__ = ["PopRiskAdamW", "param_groups"]

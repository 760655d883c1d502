"""Plain callbacks for `lightning.pytorch.Trainer(callbacks=[...])`."""

from poprisk_integrations.lightning.callbacks.early_stopping import PopRiskEarlyStopping
from poprisk_integrations.lightning.callbacks.learning_rate_finder import (
    PopRiskLearningRateFinder,
)
from poprisk_integrations.lightning.callbacks.lr_cut import PopRiskLRCut
from poprisk_integrations.lightning.callbacks.monitor import PopRiskMonitor
from poprisk_integrations.lightning.callbacks.optimizer import PopRiskOptimizer

__all__ = [
    "PopRiskEarlyStopping",
    "PopRiskLRCut",
    "PopRiskLearningRateFinder",
    "PopRiskMonitor",
    "PopRiskOptimizer",
]

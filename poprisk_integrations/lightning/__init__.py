"""Lightning: the optimizer without touching the module, the stop without validation data.

Works with `lightning.pytorch`, or with `pytorch_lightning` where only that is installed.
"""

from poprisk_integrations.lightning.callbacks import (
    PopRiskEarlyStopping,
    PopRiskLearningRateFinder,
    PopRiskLRCut,
    PopRiskMonitor,
    PopRiskOptimizer,
)

__all__ = [
    "PopRiskEarlyStopping",
    "PopRiskLRCut",
    "PopRiskLearningRateFinder",
    "PopRiskMonitor",
    "PopRiskOptimizer",
]

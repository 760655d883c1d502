"""Trainer callbacks: stop and learning-rate cut without validation data, and what the gate did."""

from poprisk_integrations.huggingface.callbacks.early_stopping import PopRiskEarlyStoppingCallback
from poprisk_integrations.huggingface.callbacks.learning_rate_cut import (
    PopRiskLRCut,
    PopRiskLRCutCallback,
)
from poprisk_integrations.huggingface.callbacks.monitor import PopRiskMonitorCallback

__all__ = [
    "PopRiskEarlyStoppingCallback",
    "PopRiskLRCut",
    "PopRiskLRCutCallback",
    "PopRiskMonitorCallback",
]

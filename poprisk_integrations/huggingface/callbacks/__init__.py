"""Trainer callbacks: the stop without validation data, and what the gate did."""

from poprisk_integrations.huggingface.callbacks.early_stopping import PopRiskEarlyStoppingCallback
from poprisk_integrations.huggingface.callbacks.monitor import PopRiskMonitorCallback

__all__ = ["PopRiskEarlyStoppingCallback", "PopRiskMonitorCallback"]

"""Trainer and TRL: optimizer names, and the stop without validation data.

Importing this package registers the names `poprisk_adamw`, `poprisk_adamw_8bit` and
`poprisk_adamw_paper` for `TrainingArguments(optim=...)`.
"""

from poprisk_integrations._imports import require

require("transformers", "accelerate", extra="hf")

from poprisk_integrations.huggingface.callbacks import (  # noqa: E402
    PopRiskEarlyStoppingCallback,
    PopRiskLRCut,
    PopRiskLRCutCallback,
    PopRiskMonitorCallback,
)
from poprisk_integrations.huggingface.last_checkpoint import last_whole_checkpoint  # noqa: E402
from poprisk_integrations.huggingface.optimizer import optimizer_cls_and_kwargs  # noqa: E402
from poprisk_integrations.huggingface.registration import register  # noqa: E402
from poprisk_integrations.huggingface.trainer_mixin import PopRiskTrainerMixin  # noqa: E402

__all__ = [
    "PopRiskEarlyStoppingCallback",
    "PopRiskLRCut",
    "PopRiskLRCutCallback",
    "PopRiskMonitorCallback",
    "PopRiskTrainerMixin",
    "last_whole_checkpoint",
    "optimizer_cls_and_kwargs",
    "register",
]

register()

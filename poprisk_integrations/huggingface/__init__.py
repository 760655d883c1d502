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
from poprisk_integrations.huggingface.checkpoints import last_whole_checkpoint  # noqa: E402
from poprisk_integrations.huggingface.learning_rate import suggest_learning_rate  # noqa: E402
from poprisk_integrations.huggingface.optimizer import (  # noqa: E402
    PopRiskTrainerMixin,
    optimizer_cls_and_kwargs,
)
from poprisk_integrations.huggingface.registration import register  # noqa: E402

__all__ = [
    "PopRiskEarlyStoppingCallback",
    "PopRiskLRCut",
    "PopRiskLRCutCallback",
    "PopRiskMonitorCallback",
    "PopRiskTrainerMixin",
    "last_whole_checkpoint",
    "optimizer_cls_and_kwargs",
    "register",
    "suggest_learning_rate",
]

register()

"""DPO on preference data with wrong labels, as a subclass of TRL's trainer."""

from poprisk_integrations._imports import require

require("transformers", "datasets", "trl", extra="trl")

from poprisk_integrations.core.noise_rate import double_annotation_rate  # noqa: E402
from poprisk_integrations.trl.cross_fit import cross_fit_flip_report  # noqa: E402
from poprisk_integrations.trl.flip_report import FlipReport  # noqa: E402
from poprisk_integrations.trl.poprisk_dpo_config import PopRiskDPOConfig  # noqa: E402
from poprisk_integrations.trl.poprisk_dpo_trainer import PopRiskDPOTrainer  # noqa: E402

__all__ = [
    "FlipReport",
    "PopRiskDPOConfig",
    "PopRiskDPOTrainer",
    "cross_fit_flip_report",
    "double_annotation_rate",
]

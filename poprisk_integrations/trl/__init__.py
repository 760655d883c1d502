"""DPO and reward models on preferences with wrong labels, as subclasses of TRL's trainers."""

from poprisk_integrations._imports import require

require("transformers", "datasets", "trl", extra="trl")

from poprisk_integrations.core.noise_rate import double_annotation_rate  # noqa: E402
from poprisk_integrations.trl.cleaning import CleanedPairs, clean_pairs  # noqa: E402
from poprisk_integrations.trl.cross_fit import CrossFit, cross_fit, cross_fit_flip_report  # noqa: E402
from poprisk_integrations.trl.flip_report import FlipReport  # noqa: E402
from poprisk_integrations.trl.poprisk_dpo_config import PopRiskDPOConfig  # noqa: E402
from poprisk_integrations.trl.poprisk_dpo_trainer import PopRiskDPOTrainer  # noqa: E402
from poprisk_integrations.trl.poprisk_reward_config import PopRiskRewardConfig  # noqa: E402
from poprisk_integrations.trl.poprisk_reward_trainer import PopRiskRewardTrainer  # noqa: E402

__all__ = [
    "CleanedPairs",
    "CrossFit",
    "FlipReport",
    "PopRiskDPOConfig",
    "PopRiskDPOTrainer",
    "PopRiskRewardConfig",
    "PopRiskRewardTrainer",
    "clean_pairs",
    "cross_fit",
    "cross_fit_flip_report",
    "double_annotation_rate",
]

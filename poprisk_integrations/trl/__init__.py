"""DPO on preference data with wrong labels, as a subclass of TRL's trainer."""

from poprisk_integrations._imports import require

require("transformers", "datasets", "trl", extra="trl")

from poprisk_integrations.trl.poprisk_dpo_config import PopRiskDPOConfig  # noqa: E402
from poprisk_integrations.trl.poprisk_dpo_trainer import PopRiskDPOTrainer  # noqa: E402

__all__ = ["PopRiskDPOConfig", "PopRiskDPOTrainer"]

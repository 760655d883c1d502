"""What the gate did, in Trainer's logs."""

import logging
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from poprisk_integrations.huggingface.callbacks.gate_metrics import gate_metrics, sample_gate_stats
from poprisk_integrations.huggingface.log_metrics import MetricsCallback

__all__ = ["PopRiskMonitorCallback"]

logger = logging.getLogger(__name__)


class PopRiskMonitorCallback(MetricsCallback):
    """Logs PopRiskAdamW's gate statistics as `poprisk/open_fraction`, `poprisk/mean_gate`, ...

    See `PopRiskAdamW.gate_stats` for their meaning. They appear in Trainer's own log lines
    (`logging_steps`), `state.log_history` and all trackers. Training is not changed.

    Args:
        every_n_steps: Optimizer steps between samples, >= 1.

    Raises:
        ValueError: If `every_n_steps` is not an integer >= 1.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        if type(every_n_steps) is not int or every_n_steps < 1:
            raise ValueError(f"Invalid every_n_steps: {every_n_steps!r}. Must be an integer >= 1.")
        self.every_n_steps = every_n_steps
        self._optimizer: Any = None
        self._device: Any = None

    def metrics(self) -> dict[str, float]:
        """The last sample; empty before the first."""
        return gate_metrics(self._optimizer, self._device)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Switch sampling on, whatever period a checkpoint brought along."""
        self._optimizer, self._device = kwargs["optimizer"], args.device
        has_gate = sample_gate_stats(self._optimizer, self.every_n_steps)
        if not has_gate and state.is_world_process_zero:
            logger.warning("PopRiskMonitorCallback: the optimizer has no gate, nothing to log.")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go of the optimizer."""
        self._optimizer = None

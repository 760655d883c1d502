"""What the gate did, in Trainer's logs."""

import logging
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from poprisk_integrations.diagnostics.guard import Guarded, guarded
from poprisk_integrations.diagnostics.joint_mean import joint_mean
from poprisk_integrations.diagnostics.layer_groups import LayerNaming, check_per_layer
from poprisk_integrations.diagnostics.layer_sample import LayerSample
from poprisk_integrations.huggingface.callbacks.gate_metrics import (
    sample_gate_stats,
    total_metrics,
    unwrap_optimizer,
)
from poprisk_integrations.huggingface.callbacks.loss_scale import inverse_loss_scale
from poprisk_integrations.huggingface.log_metrics import MetricsCallback

__all__ = ["PopRiskMonitorCallback"]

logger = logging.getLogger(__name__)


class PopRiskMonitorCallback(Guarded, MetricsCallback):
    """Logs PopRiskAdamW's gate and noise as `poprisk/open_fraction`, `poprisk/mean_gate`, ...

    See `PopRiskAdamW.gate_stats` for the gate's statistics, `diagnostics.layer_sample.LayerSample`
    for `poprisk/signal_to_noise` and `poprisk/predicted_decrease`. They appear in Trainer's own
    log lines (`logging_steps`), `state.log_history` and all trackers of `report_to`. Training is
    not changed.

    Args:
        every_n_steps: Optimizer steps between samples, >= 1.
        per_layer: Log also `poprisk/<layer>/open_fraction`, ..., of layers of the model. True for
            its numbered blocks ("model.layers.3") and the modules outside of them, 30 groups at
            most; an integer for so many leading parts of the parameters' names; or a function
            from a parameter's name to its group (None for no group). Off by default: six numbers
            per layer in each log line.

    Raises:
        ValueError: If an argument has a value that it cannot have.
    """

    def __init__(self, every_n_steps: int = 50, per_layer: LayerNaming = False) -> None:
        if type(every_n_steps) is not int or every_n_steps < 1:
            raise ValueError(f"Invalid every_n_steps: {every_n_steps!r}. Must be an integer >= 1.")
        check_per_layer(per_layer)
        self.every_n_steps = every_n_steps
        self.per_layer = per_layer
        self._optimizer: Any = None
        self._device: Any = None
        self._sample: LayerSample | None = None
        self._steps = 0  # since training began
        self._has_begun = False

    @guarded
    def metrics(self) -> dict[str, float]:
        """The last sample; empty before the first. Every rank must call it."""
        if self._sample is None:
            return {}
        tensors = [self._optimizer.gate_sums(), self._sample.sums()]
        gate, layers = joint_mean(tensors, self._device)
        found = self._sample.metrics(layers)
        return {**total_metrics(gate), **{f"poprisk/{name}": v for name, v in found.items()}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Switch sampling on, whatever period a checkpoint brought along."""
        self._device, self._steps, self._sample = args.device, 0, None
        self._has_begun = True
        self.switched_off = None
        if not sample_gate_stats(kwargs["optimizer"], self.every_n_steps):
            if state.is_world_process_zero:
                logger.warning("PopRiskMonitorCallback: the optimizer has no gate, nothing to log.")
            return
        self._optimizer = unwrap_optimizer(kwargs["optimizer"])
        names = kwargs["model"].named_parameters()
        self._sample = LayerSample(self._optimizer, names, self.per_layer)
        if self.per_layer and not self._sample.groups and state.is_world_process_zero:
            logger.warning("PopRiskMonitorCallback: no parameter is in a layer, only totals.")

    @guarded
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin, if this callback was added to a run that had begun."""
        if not self._has_begun:
            self.on_train_begin(args, state, control, **kwargs)

    @guarded
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sample the gradients of a step that is sampled."""
        if self._sample is None or not self._is_due():
            return
        # Without clipping, older versions of Trainer leave the loss scale of fp16 in the gradients.
        if inverse_loss_scale(kwargs["optimizer"]) == 1.0:
            self._sample.before_step()

    @guarded
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sample the step."""
        if self._sample is not None:
            if self._is_due():
                self._sample.after_step()
            self._steps += 1

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go of the optimizer."""
        self._optimizer = self._sample = None
        self._has_begun = False

    def switch_off(self, where: str, error: Exception) -> None:
        """Do nothing from here on, and let go of the optimizer."""
        self._optimizer = self._sample = None
        super().switch_off(where, error)

    def _is_due(self) -> bool:
        return self._steps % self.every_n_steps == 0

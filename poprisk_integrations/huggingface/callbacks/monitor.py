"""What the gate did, in Trainer's logs."""

from typing import Any

from poprisk_integrations.diagnostics.gate_monitor import GateMonitor, check_monitor
from poprisk_integrations.diagnostics.layer_sample import LayerNaming
from poprisk_integrations.huggingface.callbacks.gradients import inverse_loss_scale
from poprisk_integrations.huggingface.run_callback import RunCallback
from poprisk_integrations.huggingface.run_facts import Moment
from poprisk_integrations.optim._gate_stats import gated_optimizer

__all__ = ["PopRiskMonitorCallback"]


class PopRiskMonitorCallback(RunCallback):
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
        check_monitor(every_n_steps, per_layer)
        self.every_n_steps = every_n_steps
        self.per_layer = per_layer

    def _join(self, now: Moment, *, is_late: bool) -> None:
        optimizer = gated_optimizer(now.optimizer)
        if optimizer is None:
            self._voice.warn("the optimizer has no gate, nothing to log.")
            return
        names = now.model.named_parameters()
        monitor = GateMonitor(optimizer, names, self.per_layer, self.every_n_steps)
        self._part = _Samples(monitor, now.args.device)
        if self.per_layer and not monitor.groups:
            self._voice.warn("no parameter is in a layer, only totals.")


class _Samples:
    """What is sampled of one optimizer."""

    def __init__(self, monitor: GateMonitor, device: Any) -> None:
        self._monitor, self._device = monitor, device

    def before_optimizer_step(self, now: Moment) -> None:
        self._monitor.before_step(inverse_loss_scale(now.optimizer))

    def after_optimizer_step(self, now: Moment) -> None:
        self._monitor.after_step()

    def metrics(self) -> dict[str, float]:
        return self._monitor.metrics(self._device)

    def close(self) -> None:
        """Nothing stays on the optimizer but its period."""

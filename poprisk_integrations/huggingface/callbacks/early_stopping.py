"""Stops a Trainer without validation data."""

import sys
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerControl, TrainerState, TrainingArguments

from poprisk_integrations.core import StoppingConfig, StoppingDecision, StoppingRule
from poprisk_integrations.core.diagnosis import diagnose
from poprisk_integrations.core.window import WindowRatio
from poprisk_integrations.huggingface.callbacks.best_checkpoint import (
    check_restore,
    forget_best,
    keep_best_path,
    mark_best,
)
from poprisk_integrations.huggingface.callbacks.exported_state import place_in_run
from poprisk_integrations.huggingface.callbacks.gate_metrics import GateSampler, gate_metrics
from poprisk_integrations.huggingface.callbacks.stop_report import write_stop_report
from poprisk_integrations.huggingface.callbacks.window_callback import WindowCallback
from poprisk_integrations.huggingface.log_metrics import log_now

__all__ = ["PopRiskEarlyStoppingCallback"]

_ACTIONS = ("stop", "monitor")
_RESTORES = ("stop", "onset", None)


class PopRiskEarlyStoppingCallback(WindowCallback):
    """Ends training at `kappa` times the moment when gradients stopped carrying signal.

    F compares the summed gradient of a window of optimizer steps with the noise of its steps
    (`core.window`); when it falls below `threshold` on data that have been seen before, batches
    no longer agree on where to go. `core.StoppingRule` decides. Any torch optimizer, no eval set;
    single process, DDP, FSDP, and DeepSpeed ZeRO with an Adam (`DeepSpeedGradients`).

    Gradients are read right before the optimizer step, averaged over micro-batches and ranks.
    Clipping weighs the steps of a window against each other; with `PopRiskTrainerMixin` and
    transformers >= 5.3, and under DeepSpeed, it is undone, else the share of clipped steps is
    logged as `poprisk/clipped_fraction`. Uneven batches (a short last accumulation window,
    `num_items_in_batch` token counts) leave F unbiased: with independent g_t of one mean mu and
    any variances
        E |sum_t g_t|^2 = T^2 |mu|^2 + sum_t Var(g_t),    E[T S] = sum_t Var(g_t)
    Training time is the sum of learning rates (of groups with different ones the largest: a
    common factor cancels). A step that the fp16 grad scaler skipped counts for nothing.

    Where it must stay off: grokking and other delayed generalisation, and epoch-wise double
    descent, where memorising comes first. It never stops in a first pass over the data, so
    streaming runs of one pass end as they would. Sorted, curriculum or re-weighted data make
    batches that are not exchangeable, which F cannot see.

    Logs `poprisk/signal_ratio` (F of the last window), `poprisk/risk_decrease` (C),
    `poprisk/agreement` (U), each with `_se`, `poprisk/onset_step`,
    `poprisk/predicted_stop_step` (at the present learning rate) and the gate statistics
    in Trainer's log lines, `state.log_history` and all trackers; of a second such callback as
    `poprisk/2/...`. An onset and a stop get a log line of their own. At the end
    `poprisk_stop.json` in the output directory tells why, with one row per window. A resumed run
    continues as if it had never been interrupted (an unfinished window of sharded models starts
    afresh).

    Args:
        kappa: Stop at this multiple of the training time of the onset, >= 1.
        window: Optimizer steps per window, >= 4, or "auto": one epoch, a third of an epoch for
            runs of under eight, a twentieth of the run if the length of an epoch is unknown; at
            least 8 (`diagnostics.auto_window_steps`).
        threshold: F below this is the onset, > 0. An onset counts once F has exceeded 1.05 times
            this; two windows in a row above 1.3 times this take it back.
        min_steps: No stop before this many optimizer steps.
        action: "stop", or "monitor" to log and change nothing.
        restore: The run's best checkpoint. "stop": the one of the stop, saved there unless
            `save_strategy="no"`. "onset": the one of the onset; needs `save_strategy="best",
            load_best_model_at_end=True`. None: neither is saved or marked. Where an evaluation
            metric picks the best checkpoint, "stop" saves without marking.
        accumulator: "auto", "exact" or "sample", see `diagnostics.GradientWindow`.
        epoch_steps: Optimizer steps of one pass over the data, for loaders that repeat inside or
            have no length. None: the loader's length, or the epochs that Trainer has ended.

    Raises:
        ValueError: If an argument is outside its range; at the start of training if `restore`
            does not fit the training arguments, if another callback of this kind stops the run
            too, if nothing is trained, or if DeepSpeed runs an optimizer without an Adam's state.

    Example:
        >>> PopRiskEarlyStoppingCallback(kappa=3.0, window=20).state()["args"]["window"]
        20
    """

    def __init__(
        self,
        kappa: float = 2.0,
        window: int | str = "auto",
        threshold: float = 1.0,
        min_steps: int = 0,
        action: str = "stop",
        restore: str | None = "stop",
        *,
        accumulator: str = "auto",
        epoch_steps: int | None = None,
    ) -> None:
        for name, value, allowed in (("action", action, _ACTIONS), ("restore", restore, _RESTORES)):
            if value not in allowed:
                raise ValueError(f"Invalid {name}: {value!r}. Must be one of {allowed}.")
        self.kappa = kappa
        self.threshold = threshold
        self.min_steps = min_steps
        self.action = action
        self.restore = restore
        defaults = StoppingConfig()
        self._config = StoppingConfig(
            kappa=kappa,
            threshold=threshold,
            arm_threshold=defaults.arm_threshold * threshold,
            rearm_threshold=defaults.rearm_threshold * threshold,
            min_steps=min_steps,
        )
        self._rule = StoppingRule(self._config)
        super().__init__(window, accumulator, epoch_steps)
        self._gate: GateSampler | None = None
        self._step, self._lr = 0, 0.0
        self._optimizer: Any = None
        self._device: Any = None

    @property
    def stopping_state(self) -> dict[str, Any]:
        """What the rule remembers, see `core.StoppingState`."""
        return self.rule_state

    def state(self) -> dict[str, Any]:
        """Arguments and numbers for `trainer_state.json`."""
        names = ("kappa", "window", "threshold", "min_steps", "action", "restore")
        return self._state(*names, "accumulator", "epoch_steps")

    def metrics(self) -> dict[str, float]:
        """The present values of all that this callback logs."""
        rule, values = self._rule.state, self.progress.last_measures()
        values["onset_step"] = rule.onset_step
        values["predicted_stop_step"] = self._rule.predicted_stop_step(self._step, self._lr)
        if self._reader is not None:
            values["clipped_fraction"] = self._reader.clipping.fraction
        prefix = "poprisk/" if self._place == 1 else f"poprisk/{self._place}/"
        known = {f"{prefix}{name}": v for name, v in values.items() if v is not None}
        return {**known, **gate_metrics(self._optimizer, self._device)}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the settings, then start afresh or continue from the checkpoint."""
        if self.action == "stop":
            check_restore(self.restore, args)
            if place_in_run(state, f"{type(self).__name__} that stops") > 1:
                raise ValueError(
                    "Invalid action: 'stop' in two PopRiskEarlyStoppingCallbacks of one run. Give "
                    "all but one action='monitor'."
                )
        super().on_train_begin(args, state, control, **kwargs)
        self._optimizer, self._device = kwargs["optimizer"], args.device
        self._gate = GateSampler(self._optimizer)
        assert self._reader is not None
        self._step, self._lr = state.global_step, self._reader.lr
        if self.min_steps > state.max_steps:
            self._warn(
                state,
                f"min_steps={self.min_steps} is beyond the run's {state.max_steps} steps: it can "
                "never stop early.",
            )
        if self._rule.state.stop_step is not None and self.action == "stop":
            self._warn(
                state,
                f"this run had stopped at step {self._rule.state.stop_step}; Trainer takes one "
                "more step before it can stop again.",
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sample the gate at the last step of a window."""
        assert self._reader is not None
        assert self._gate is not None
        if self.progress.window_seen == self._reader.window.steps - 1:
            self._gate.before_step()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the window beside Trainer's files."""
        if self.action == "stop":
            keep_best_path(args, state)
        super().on_save(args, state, control, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the report and let go of the optimizer and the window."""
        if state.is_world_process_zero and self._reader is not None:
            clipping = self._reader.clipping
            report = {
                "stopped": self._rule.state.stop_step is not None and self.action == "stop",
                "global_step": state.global_step,
                **self.stopping_state,
                "diagnosis": self._explanation(),
                "window_steps": self._reader.window.steps,
                "best_model_checkpoint": state.best_model_checkpoint,
                "clipped_fraction": clipping.fraction,
                "clipping": clipping.verdict(),
                "settings": self.state()["args"],
                "history": self.progress.history,
            }
            write_stop_report(str(args.output_dir), report, self._place)
        self._optimizer = self._gate = None
        super().on_train_end(args, state, control, **kwargs)

    def _after_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        window: WindowRatio | None,
        kwargs: dict[str, Any],
    ) -> None:
        assert self._reader is not None
        assert self._gate is not None
        self._gate.after_step()
        self._step = state.global_step
        lr = 0.0 if self._reader.was_skipped() else self._reader.lr
        before = self._rule.state
        measured = {} if window is None else _measures(window)
        decision = self._rule.update(
            step=state.global_step,
            lr=lr,
            reused=self.progress.window_reused,
            **measured,
        )
        if window is not None:
            self.progress.record(state.global_step, self._rule.state.lr_sum, window)
        self._lr = self._reader.lr
        stops_now = decision.stop and before.stop_step is None
        if self.action == "stop":
            forgotten = before.onset_step is not None and self._rule.state.onset_step is None
            self._act(args, state, control, decision, stops_now=stops_now, forgotten=forgotten)
        if stops_now and state.is_world_process_zero:
            verdict = decision.reason if self.action == "stop" else f"would have {decision.reason}"
            line = f"poprisk: {verdict}; {self._explanation()}"
            tqdm.write(line, file=sys.stderr)  # leaves progress bars whole

    def _act(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        decision: StoppingDecision,
        *,
        stops_now: bool,
        forgotten: bool,
    ) -> None:
        if self.restore == "onset" and forgotten:
            forget_best(args, state)
        if (self.restore == "onset" and decision.onset) or (self.restore == "stop" and stops_now):
            mark_best(args, state, control, self._rule.state.signal_ratio)
        if decision.onset or stops_now or forgotten:
            log_now(args, control)
        if decision.stop:
            control.should_training_stop = True

    def _explanation(self) -> str:
        since, rows = self._rule.state.onset_step, self.progress.history
        return str(diagnose(rows, since=since, threshold=self.threshold))


def _measures(window: WindowRatio) -> dict[str, float]:
    return {
        "ratio": window.ratio,
        "ratio_se": window.ratio_se,
        "noise": float(window.noise.sum()),
    }

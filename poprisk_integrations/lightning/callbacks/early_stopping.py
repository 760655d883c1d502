"""Stops a Lightning Trainer without validation data."""

import math
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from poprisk_integrations.diagnostics.guard import Guarded, guarded
from poprisk_integrations.diagnostics.risk_stop import COOLDOWN_END
from poprisk_integrations.diagnostics.stop_options import StopArguments
from poprisk_integrations.diagnostics.stop_report import full_row
from poprisk_integrations.lightning._upstream import (
    SHARDED,
    Callback,
    LightningModule,
    MisconfigurationException,
    Trainer,
    callbacks_of,
    can_stop_early,
    is_fast_dev_run,
    rank_zero_info,
    rank_zero_warn,
    refuse_strategy,
    run_steps,
    schedule_outlook,
    steps_per_epoch,
    strategy_is,
)
from poprisk_integrations.lightning.callbacks.risk_stop import FitRisk
from poprisk_integrations.lightning.callbacks.run_result import (
    RunResult,
    StepLog,
    leave_report,
    report_directory,
)

if TYPE_CHECKING:
    from poprisk_integrations.lightning.callbacks.signal_callback import SignalCallback

__all__ = ["PopRiskEarlyStopping"]

_NAME = "PopRiskEarlyStopping"
_MEASURES_OR_DECIDES = (
    *("criterion", "sit_out", "patience", "action"),
    *("kappa", "window", "threshold", "min_steps", "accumulator", "epoch_steps"),
)


class PopRiskEarlyStopping(StopArguments, Guarded, Callback):
    """Ends training where the test loss stops falling, estimated from the training data alone.

    criterion="risk": a random share `sit_out` of the examples is not trained on for a while
    (`diagnostics.SittingOut`); all are in the end. What they lose meanwhile, measured without
    gradient by the module's own `training_step` in training mode, is what unseen examples lose. It
    reads no gradients and costs no extra examples. Needed are a map-style data set, a sampler that
    draws each example once per epoch, and losses of torch in `training_step`
    (`diagnostics.ExampleLosses`) or `example_losses`.

    criterion="signal": F compares the summed gradient of a window with the noise of its steps
    (`core.window`); the run ends at `kappa` times the moment when F fell below `threshold` on data
    seen before (`core.StoppingRule`). Must be off where generalisation comes after memorising
    (grokking).

    Under either, a run is not ended while its learning rate warms up or is still to decay.
    Decisions are taken after optimizer steps, from numbers that were joined over ranks, so all
    ranks stop together. They wait for the trainer's `min_epochs` and `min_steps`, and are taken
    back if the reason has gone by then. A single pass over the data is never ended.

    Logs, as metrics that ModelCheckpoint, EarlyStopping and ReduceLROnPlateau can watch,
    `poprisk/estimated_test_loss` and `poprisk/estimated_gap`, for classes
    `poprisk/estimated_test_accuracy`, each with `_se`; under "signal" `poprisk/signal_ratio` (F),
    `poprisk/risk_decrease` (C), `poprisk/agreement` (U), `poprisk/onset_step` and
    `poprisk/predicted_stop_step`. Where none exists yet, give a callback that monitors it
    `strict=False`. Where the run keeps files, `poprisk_stop.json` is left in the logger's
    directory, else in ModelCheckpoint's. A resumed run equals one that was never interrupted.

    Args:
        criterion: "risk", "signal", or "auto": "risk" where it can be had, else F is measured and
            logged, and nothing is stopped.
        sit_out: Share of the examples that sits out at a time, in (0, 0.5]. With "risk" only.
        patience: Windows without a new minimum before the stop, >= 1. With "risk" only.
        action: What is done once the smallest estimate lies behind. "cooldown": go back to the best
            weights, anneal the learning rate to zero over a tail, on all data, and end then; with
            "signal" from the present weights. "stop": end at once. "monitor": log only. None:
            "cooldown" with "risk" ("stop" under DeepSpeed), "stop" with "signal". At most one
            callback acts.
        restore: Which weights are the run's result. "best": those of the smallest estimate, saved
            into ModelCheckpoint's directory or `default_root_dir` (sharded ones and those of a
            cooldown are copied in memory), and loaded back when `fit` ends; after a cooldown the
            last ones; under "signal" as "stop": those of the last step. "onset": those of the onset
            of "signal". None: as "stop", and `best_model_path` stays empty.
        window: Optimizer steps per window of "signal", >= 4, or "auto"
            (`diagnostics.auto_window_steps`).
        kappa: Of "signal": stop at this multiple of the training time of the onset, >= 1.
        threshold: Of "signal": F below this is the onset, > 0. It counts once F has exceeded 1.05
            times this; two windows in a row above 1.3 times this take it back.
        min_steps: No stop before this many optimizer steps.
        accumulator: Of "signal": "exact", "sample" (of each tensor, for large models) or "auto".
        epoch_steps: Of "signal": optimizer steps of one pass over the data, for streams and loaders
            of your own; without it such a run is never stopped.
        example_losses: Losses per example, (B,), of (module, batch), where they cannot be found in
            `training_step`; it costs a forward pass more. With "risk" only.

    Raises:
        ValueError: If an argument is outside its range, or does not go with the criterion.
        MisconfigurationException: When `fit` starts, if the criterion cannot work in this run
            (the message says why), and for two callbacks that act. With `action="monitor"` a
            warning says instead that nothing is measured.

    Example:
        >>> callback = PopRiskEarlyStopping(criterion="signal", kappa=3.0, window=20)
        >>> callback.stopped_step, callback.stopping_reason
        (None, 'no window is complete yet')
    """

    def _begin_afresh(self) -> None:
        self.action = self.options.action
        values = tuple(getattr(self.options, name) for name in _MEASURES_OR_DECIDES)
        self._key = f"{_NAME}{values!r}"  # Lightning asks at every hook
        self.switched_off = None
        self._risk = FitRisk(self.options)
        self._signal: SignalCallback | None = None
        self._in_use: FitRisk | SignalCallback | None = None  # None where nothing is measured
        self._has_begun = False  # batches
        self._cooled_step: int | None = None  # at which a cooldown has ended
        self._result = RunResult(self.options.restore, self.action != "monitor", _NAME)
        self._log = StepLog()

    @property
    def state_key(self) -> str:
        """Callbacks that differ in what they measure, decide or do keep states apart."""
        return self._key

    @property
    def _gradients(self) -> "SignalCallback":
        """What reads them; imported where it is used."""
        if self._signal is None:
            from poprisk_integrations.lightning.callbacks.signal_callback import SignalCallback

            self._signal = SignalCallback(self)
        return self._signal

    @property
    def _criterion(self) -> "FitRisk | SignalCallback":
        """In use, or of which there is a state."""
        return self._in_use or self._signal or self._risk

    @property
    def stopped_step(self) -> int | None:
        """Optimizer step at which this callback ended the run; None if it did not."""
        stops = {"stop": self._criterion.stop_step, "cooldown": self._cooled_step}
        return stops.get(self._criterion.action)

    @property
    def best_step(self) -> int | None:
        """Optimizer step of the smallest estimate of the test loss; None where there is none."""
        return self._risk.best_step

    @property
    def onset_step(self) -> int | None:
        """Optimizer step of the onset of "signal"; None if there is none."""
        return None if self._signal is None else self._signal.onset_step

    @property
    def stopping_reason(self) -> str:
        """The last change of mind, and what the last window says, alike on all ranks."""
        return self._criterion.reason

    @property
    def history(self) -> list[dict[str, Any]]:
        """One dict per window: step, train_loss, estimated_gap, estimated_test_loss, signal_ratio.

        And what else the criterion measures; None where something was not measured.
        """
        return [full_row(row) for row in self._criterion.history]

    @property
    def best_model_path(self) -> str:
        """Checkpoint of the run's result, "" if there is none.

        With `restore="best"` and "onset" ours; with "stop", after `fit`, the one that a
        ModelCheckpoint saved at the stop.
        """
        return self._result.path

    def metrics(self) -> dict[str, float]:
        """The present values of all that this callback logs, without what does not exist yet."""
        return self._criterion.metrics()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, and start afresh: a checkpoint is loaded after this."""
        if stage != "fit":
            return
        self._begin_afresh()
        ours = [c for c in callbacks_of(trainer) if isinstance(c, PopRiskEarlyStopping)]
        stops = [callback for callback in ours if callback.action != "monitor"]
        if len(stops) > 1:  # the first would hide the second
            raise MisconfigurationException(
                f"Invalid action: {stops[0].action or 'stop'!r} on {len(stops)} {_NAME} callbacks "
                "of one Trainer. Set action='monitor' on all but one."
            )
        if not self.options.asks_for_signal:
            self._risk.attach(trainer, pl_module)
        elif self.action != "monitor":
            refuse_strategy(trainer, _NAME)
            if self.options.restore == "onset" and strategy_is(trainer, *SHARDED):
                raise MisconfigurationException(
                    f"Invalid restore: 'onset'. Under {type(trainer.strategy).__name__} weights "
                    "are sharded and cannot be loaded back when fit ends. Use restore='stop' or "
                    "None."
                )

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Continue also from the one state that no callback claims: ours had other arguments."""
        states = checkpoint.get("callbacks") or {}
        claimed = {callback.state_key for callback in callbacks_of(trainer)}
        left = [key for key in states.keys() - claimed if str(key).startswith(f"{_NAME}(")]
        if self.state_key not in states and len(left) == 1:
            self.load_state_dict(states[left[0]])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot work, before any step; windows open with the first batch."""
        if not self.options.asks_for_signal and not is_fast_dev_run(trainer):
            self._risk.open(trainer, pl_module)
        run = self._risk.prepared
        if run is None or is_fast_dev_run(trainer):
            self._take_signal(trainer, pl_module)
            return
        holds_weights = strategy_is(trainer, "DeepSpeedStrategy")
        try:
            self._risk.choose_action(holds_weights=holds_weights)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from None
        if self.action is None and holds_weights:
            rank_zero_info(
                f"{_NAME}: under DeepSpeed there is no cooldown from the best weights; "
                "action='stop' it is."
            )
        self._result.check_best(trainer, pl_module, self._risk)
        if trainer.global_step > 0 and not self._risk.is_loaded:
            rank_zero_warn(
                f"{_NAME}: it knows nothing of the steps before {trainer.global_step}; the test "
                "loss is estimated from there on."
            )
        self._risk.start(run, steps_per_epoch(trainer), schedule_outlook(trainer))
        run.experiment.begin_epoch(trainer.current_epoch)
        self._use(trainer, self._risk)

    def _take_signal(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Use F, where it was asked for or the test loss cannot be estimated."""
        self._in_use = None
        is_trial, why = is_fast_dev_run(trainer), self._risk.refusal
        if self.options.criterion == "risk" and not is_trial:
            line = f"the test loss cannot be estimated in this run: {why}"
            if self._risk.is_single_pass:
                rank_zero_info(
                    f"{_NAME}: there is nothing to stop in a single pass over the data, in which "
                    "the training loss before each step is one of unseen examples."
                )
            elif self.action == "monitor":
                rank_zero_warn(f"{_NAME}: {line}.")
            else:
                raise MisconfigurationException(
                    f"Invalid criterion: 'risk'. For {_NAME}, {line}. Use criterion='auto' or "
                    "'signal'."
                )
            return
        try:
            self._gradients.begin(trainer, pl_module, why)
        except MisconfigurationException as error:
            if self.action != "monitor" and self.options.asks_for_signal:
                raise
            rank_zero_warn(f"{_NAME}: it measures nothing in this run: {error}")
            return
        if not is_trial:
            self._result.check_onset(trainer, self.onset_step)
            self._use(trainer, self._gradients)

    def _use(self, trainer: Trainer, criterion: "FitRisk | SignalCallback") -> None:
        """Measure by it from here on; a run that had stopped stays stopped, if it may."""
        self._in_use = criterion
        if criterion.stop_step is None:
            return
        if not can_stop_early(trainer):
            criterion.judge_anew()
        elif criterion.action == "stop":
            trainer.should_stop = True
            rank_zero_info(
                f"{_NAME}: the checkpoint's run has stopped "
                f"{self.stopping_reason.removeprefix('stopped ')}. To train on, set "
                "action='monitor'."
            )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure who sits out, before the batch is trained on."""
        if self._in_use is self._risk and not self._has_begun:
            self._has_begun = True
            self._risk.settle(trainer, pl_module)
            if self._risk.run is None:
                self._take_signal(trainer, pl_module)
            else:
                line = self._risk.start_line(steps_per_epoch(trainer) or 1)
                rank_zero_info(f"{_NAME}: {line}")
        if self._in_use is self._risk:
            self._measure(trainer, pl_module, batch, batch_idx)
        elif self._in_use is not None:
            self._gradients.on_train_batch_start(trainer, pl_module, batch, batch_idx)

    @guarded
    def _measure(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._risk.before_batch(trainer, pl_module, batch, batch_idx)

    @guarded
    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Take in what the batch's examples lose."""
        if self._in_use is self._risk:
            self._risk.after_forward(trainer, loss)

    @guarded
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count micro-batches."""
        if self._in_use is not None and self._in_use is self._signal:
            self._gradients.on_after_backward(trainer, pl_module)

    @guarded
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Take in this step's gradients, or set the learning rate of a cooldown."""
        if self._in_use is not None and self._in_use is self._signal:
            self._gradients.on_before_optimizer_step(trainer, pl_module, optimizer)
        else:
            schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
            self._risk.before_step([optimizer], schedulers)

    @guarded
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Decide after an optimizer step or at the end of a window, and log."""
        if self._in_use is None:
            return
        if self._in_use is self._risk:
            is_closed = self._risk.after_batch(trainer, batch_idx)
            if self._risk.is_new_best:
                self._result.keep_best(trainer)
            self.conclude(trainer, pl_module, is_new=is_closed)
        else:
            self._gradients.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._cooled_step is None and self._criterion.cooldown_is_over:
            self._cooled_step = trainer.global_step
            trainer.should_stop = True
            rank_zero_info(f"{_NAME}: {COOLDOWN_END}")

    def conclude(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        *,
        is_new: bool,
        is_onset: bool = False,
        is_decision: bool = False,
    ) -> None:
        """Act on what was measured at a step, or decided, and log it."""
        has_acted = self._act(trainer)
        self._result.after_step(trainer, self.onset_step, is_onset=is_onset)
        is_decision = is_decision or has_acted
        self._log.write(trainer, pl_module, self.metrics, is_new=is_new, is_decision=is_decision)

    def _act(self, trainer: Trainer) -> bool:
        """Whether a stop was due and nothing made it wait: then it was done."""
        criterion, step = self._criterion, trainer.global_step
        if not can_stop_early(trainer) or not criterion.accept(step):
            return False
        if criterion.action == "stop":
            trainer.should_stop = True
        left = (run_steps(trainer) or math.inf) - step
        rank_zero_info(f"{_NAME}: {criterion.end(step, left, self._result.go_back)}")
        return True

    @guarded
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Act on a verdict that had to wait for the end of the epoch."""
        if self._in_use is not None and self._act(trainer) and not trainer.barebones:
            self._log.write_now(trainer, self.metrics())

    @guarded
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what was done, load the best weights back, leave a report."""
        criterion, is_risk = self._in_use, self._in_use is self._risk
        if criterion is None:
            return
        said = []
        if criterion.stop_step is None:  # else it was said when it happened
            said.append(f"did not stop this run: {self.stopping_reason}")
        if is_risk:
            said.append(self._risk.end_line())
        if said:
            rank_zero_info(f"{_NAME}: {'; '.join(said)}")
        self._result.after_fit(trainer, pl_module, self.onset_step, self.stopped_step)
        if is_risk and self._risk.keeps_best():
            self._result.load_best(pl_module, self.best_step)
        elif is_risk:
            self._result.prefer_last(trainer, is_final=self._cooled_step is not None)
        if self.action != "monitor" and trainer.is_global_zero:
            self._leave_report(trainer, criterion.report())

    def _leave_report(self, trainer: Trainer, found: dict[str, Any]) -> None:
        directory = report_directory(trainer)
        if directory is None:
            return
        settings = {k: v for k, v in self.options.arguments().items() if k != "example_losses"}
        report = {
            "stopped": self.stopped_step is not None,
            "global_step": trainer.global_step,
            **found,
            "why": self._risk.refusal or None,
            "history": self.history,
            "best_model_path": self.best_model_path,
            "settings": settings,
        }
        try:
            leave_report(directory, report)
        except Exception as error:  # whatever a file system raises: the run itself ended well
            rank_zero_warn(f"{_NAME}: its report could not be written to {directory} ({error!r}).")

    @guarded
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the optimizer, the loader and the strategy."""
        self._risk.detach(trainer)
        if self._signal is not None:
            self._signal.teardown(trainer, pl_module, stage)

    @guarded
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Same."""
        self.teardown(trainer, pl_module, "fit")

    def switch_off(self, where: str, error: Exception) -> None:
        """Let everybody be trained on from here on, too."""
        super().switch_off(where, error)
        self._in_use = None
        self._risk.refuse(f"{_NAME} is switched off")

    def state_dict(self) -> dict[str, Any]:
        """Numbers, strings, None and tensors: safe for `weights_only` loading."""
        return self._state() or {}

    @guarded
    def _state(self) -> dict[str, Any]:
        has_signal = self._signal is not None or self.options.asks_for_signal
        signal = self._gradients.state_dict() if has_signal else {}
        return {**signal, **self._result.state_dict(), "risk": self._risk.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore; windows follow when training starts and devices are known."""
        try:
            self._result.load_state_dict(state_dict)
            if state_dict.get("risk") is not None:
                self._risk.load_state_dict(state_dict["risk"])
            elif self.options.asks_for_signal or "rule" in state_dict or "risk" not in state_dict:
                self._gradients.load_state_dict(state_dict)
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"The state of {_NAME} in the checkpoint is damaged: {error!r}. Resume from "
                "another checkpoint."
            ) from error

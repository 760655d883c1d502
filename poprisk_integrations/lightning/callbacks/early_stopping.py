"""Stops a Lightning Trainer without validation data."""

from typing import Any, Literal

from poprisk_integrations.core import StoppingConfig
from poprisk_integrations.diagnostics.guard import guarded
from poprisk_integrations.diagnostics.stop_outlook import outlook_line, stop_outlook
from poprisk_integrations.lightning._upstream import (
    LightningModule,
    MisconfigurationException,
    Trainer,
    callbacks_of,
    can_stop_early,
    is_fast_dev_run,
    rank_zero_info,
    rank_zero_warn,
)
from poprisk_integrations.lightning.callbacks.arguments import (
    check_choice,
    check_epoch_steps,
    check_window,
)
from poprisk_integrations.lightning.callbacks.refusals import refuse_second_stop, refuse_strategy
from poprisk_integrations.lightning.callbacks.resume import find_state
from poprisk_integrations.lightning.callbacks.run_length import run_steps
from poprisk_integrations.lightning.callbacks.run_plan import setup_changes
from poprisk_integrations.lightning.callbacks.run_result import RunResult
from poprisk_integrations.lightning.callbacks.step_feed import StepFeed
from poprisk_integrations.lightning.callbacks.step_log import StepLog
from poprisk_integrations.lightning.callbacks.stop_judge import StopJudge
from poprisk_integrations.lightning.callbacks.stop_report import report_directory, write_report
from poprisk_integrations.lightning.callbacks.window_callback import WindowCallback

__all__ = ["PopRiskEarlyStopping"]

_NAME = "PopRiskEarlyStopping"
_SETTINGS = ("kappa", "threshold", "min_steps")  # of the rule, not of what is measured


class PopRiskEarlyStopping(WindowCallback):
    """Ends training at `kappa` times the moment when gradients stopped carrying signal.

    F compares the summed gradient of a window of optimizer steps with the noise of its steps
    (`core.window`); when it falls below `threshold` on data seen before, batches no longer agree
    on where to go. `core.StoppingRule` decides. Any torch optimizer, no validation data.

    Gradients are read in `on_before_optimizer_step`: averaged over micro-batches (also of the
    short step that may end an epoch) and ranks, unscaled and unclipped, whole or sharded
    (FSDPStrategy, ModelParallelStrategy). A step that the fp16 grad scaler skipped counts for
    nothing. Training time is the sum of learning rates, each read at its step, before schedulers
    (of groups with different ones the largest).

    The decision is taken after optimizer steps, from numbers that were averaged over ranks, so
    all ranks stop together and report the same reason. It waits for the trainer's `min_epochs`
    and `min_steps`, and is taken back if the signal returns meanwhile. Note that Lightning reads
    `Trainer(min_steps=...)` as at least one whole epoch; `min_steps` of this callback does not.

    The aim is the least loss under the noise of the training data. It must be off where
    generalisation comes after memorising (grokking, epoch-wise double descent). It never stops a
    run that sees each example once: what counts is a pass over the data, as sampler and data set
    show it, not an epoch of the trainer (`limit_train_batches`). It cannot see that data are
    sorted, packed or a curriculum: their batches are not exchangeable. Dropout and fresh
    augmentation add to the noise and make it stop earlier.

    Logs, of the last window `poprisk/signal_ratio` (F), `poprisk/risk_decrease` (C, first-order
    gain of repeating a step), `poprisk/agreement` (U, product of consecutive gradients) and their
    standard errors `..._se`, and `poprisk/onset_step` and `poprisk/predicted_stop_step` (at the
    present learning rate), each from when it exists on; NaN once an onset is forgotten. Where a
    window is longer than an epoch, give an EarlyStopping or a scheduler that monitors one of them
    `strict=False`. Decisions reach the loggers at their step, whatever `log_every_n_steps`. One
    line at the start says what the callback can do in this run, one at the end what it did. Where
    the run keeps files, a stopping callback leaves `poprisk_stop.json` in the logger's directory
    of the run, else in ModelCheckpoint's.

    The state is in the checkpoint, with an unfinished window: a resumed run equals one that was
    never interrupted. With other settings, another world size, batch size, accumulation or
    window, and under sharding strategies, training time continues and the unfinished window
    starts afresh, with a warning. The same, with a line, where accumulation, batch size or the
    trained parameters change in mid-run.

    Args:
        kappa: Stop at this multiple of the training time of the onset, >= 1.
        window: Optimizer steps per window, >= 4, or "auto": one epoch, a third of an epoch for
            runs of under eight, a twentieth of the run if the length of an epoch is unknown (50
            steps if that of the run is too); at least 8 (`diagnostics.auto_window_steps`). An
            epoch is one pass over the data.
        threshold: F below this is the onset, > 0. An onset counts once F has exceeded 1.05 times
            this; two windows in a row above 1.3 times this take it back.
        min_steps: No stop before this many optimizer steps.
        action: "stop", or "monitor" to log and change nothing. At most one stops.
        restore: Which weights are the run's result. "stop": those of the last step, as they are.
            "onset": those of the onset; a checkpoint is saved there, into ModelCheckpoint's
            directory or `default_root_dir`, and loaded back into the module when `fit` ends.
            None: as "stop", and `best_model_path` stays empty.
        accumulator: "exact", "sample" (of each tensor, for large models) or "auto", see
            `diagnostics.GradientWindow`.
        epoch_steps: Optimizer steps of one pass over the data, for streams, loaders and samplers
            of your own, and data that repeat inside. None to ask the loader
            (`diagnostics.data_pass`); where it does not show when an example comes again, the run
            counts as a single pass and is never stopped.

    Raises:
        ValueError: If an argument is outside its range.
        MisconfigurationException: When `fit` starts, for manual optimization, an optimizer that
            trains nothing, two stopping callbacks, and DeepSpeed. With `action="monitor"` a
            warning says instead that nothing is measured.

    Example:
        >>> callback = PopRiskEarlyStopping(kappa=3.0, window=20)
        >>> callback.stopped_step, callback.stopping_reason
        (None, 'no window is complete yet')
    """

    _name = _NAME

    def __init__(
        self,
        kappa: float = 2.0,
        window: int | Literal["auto"] = "auto",
        threshold: float = 1.0,
        min_steps: int = 0,
        action: Literal["stop", "monitor"] = "stop",
        restore: Literal["stop", "onset"] | None = "stop",
        accumulator: Literal["auto", "exact", "sample"] = "auto",
        epoch_steps: int | None = None,
    ) -> None:
        check_window(window)
        check_choice("action", action, ("stop", "monitor"))
        check_choice("restore", restore, ("stop", "onset", None))
        check_choice("accumulator", accumulator, ("auto", "exact", "sample"))
        check_epoch_steps(epoch_steps)
        defaults = StoppingConfig()
        self._config = StoppingConfig(
            kappa=kappa,
            threshold=threshold,
            arm_threshold=defaults.arm_threshold * threshold,
            rearm_threshold=defaults.rearm_threshold * threshold,
            min_steps=min_steps,
        )
        self.window = window
        self.action = action
        self.restore = restore
        self.accumulator = accumulator
        self.epoch_steps = epoch_steps
        self._reset()

    def _reset(self) -> None:
        super()._reset()
        self._judge = StopJudge(self._config, _NAME)
        self._result = RunResult(self.restore, self.action == "stop", _NAME)
        self._log = StepLog()

    @property
    def state_key(self) -> str:
        """Callbacks that differ in what they measure, decide or do keep states apart."""
        c = self._config
        arguments = (self.action, c.kappa, self.window, c.threshold, c.min_steps)
        return f"{_NAME}{(*arguments, self.accumulator, self.epoch_steps)!r}"

    @property
    def stopped_step(self) -> int | None:
        """Optimizer step of the stop; None if this callback stopped nothing."""
        return self._judge.state.stop_step if self.action == "stop" else None

    @property
    def onset_step(self) -> int | None:
        """Optimizer step of the onset; None if there is none."""
        return self._judge.state.onset_step

    @property
    def stopping_reason(self) -> str:
        """The last change of mind, and what the last window says, alike on all ranks."""
        return self._judge.reason

    @property
    def history(self) -> list[dict[str, Any]]:
        """One dict per window: step, lr_sum, F, C, U, their standard errors, noise, steps, reused.

        None where something was not measured.
        """
        return self._judge.history

    @property
    def best_model_path(self) -> str:
        """Checkpoint of the run's result, "" if there is none.

        With `restore="onset"` the onset's; with "stop", after `fit`, the one that a
        ModelCheckpoint saved at the stop.
        """
        return self._result.path

    def metrics(self) -> dict[str, float]:
        """The present values of all that this callback logs, without what does not exist yet."""
        feed = self._feed
        return self._judge.metrics(*((0, 0.0) if feed is None else (feed.step, feed.reader.lr)))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, and start afresh: a checkpoint is loaded after this."""
        if stage == "fit":
            self._reset()
            if self.action == "stop":
                refuse_strategy(trainer, _NAME, self.restore)
            ours = [c for c in callbacks_of(trainer) if isinstance(c, PopRiskEarlyStopping)]
            refuse_second_stop(ours)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Continue also from the state of a callback that had other arguments."""
        if self.state_key in (checkpoint.get("callbacks") or {}):
            return
        keys = [callback.state_key for callback in callbacks_of(trainer)]
        found = find_state(checkpoint, self.state_key, keys)
        if found is not None:
            self.load_state_dict(found)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot work, before any step; the window opens with the first batch."""
        try:
            feed = self._new_feed(trainer, pl_module)
        except (MisconfigurationException, ValueError) as error:
            if self.action == "stop":
                raise
            rank_zero_warn(f"{_NAME}: it measures nothing in this run: {error}")
            return
        if is_fast_dev_run(trainer):
            feed.release()
            return
        self._result.check(trainer, self.onset_step)
        if setup_changes(self._setup, self._settings()):
            self._judge.judge_anew(self._setup["kappa"])
        self._open(feed)
        self._resume_stopped(trainer)

    def _new_feed(self, trainer: Trainer, pl_module: LightningModule) -> StepFeed:
        refuse_strategy(trainer, _NAME)
        return StepFeed(
            trainer,
            pl_module,
            owner=_NAME,
            window=self.window,
            accumulator=self.accumulator,
            epoch_steps=self.epoch_steps,
        )

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self._config, name) for name in _SETTINGS}

    def _before_first_batch(self, trainer: Trainer, feed: StepFeed) -> None:
        plan = feed.plan
        outlook = stop_outlook(run_steps(trainer), plan.epoch_steps, plan.window)
        line = outlook_line(
            outlook, unknown_because=plan.unknown_because, min_steps=self._config.min_steps
        )
        rank_zero_info(f"{_NAME}: {line}")

    def _after_step(self, trainer: Trainer, pl_module: LightningModule, feed: StepFeed) -> None:
        before, is_closed = self._judge.state, feed.is_full
        decision = self._judge.after_step(trainer, feed)
        has_acted = self._act_on_verdict(trainer)
        self._result.after_step(trainer, self.onset_step, is_onset=decision.onset)
        self._log.write(
            trainer,
            pl_module,
            feed.step,
            self.metrics,
            is_new=is_closed,
            is_decision=has_acted or before.onset_step != self.onset_step,
        )

    @guarded
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Act on a verdict that had to wait for the end of the epoch."""
        if self._feed is not None and self._act_on_verdict(trainer) and not trainer.barebones:
            self._log.write_now(trainer, self._feed.step, self.metrics())

    @guarded
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what was done, load the onset's weights back, leave a report."""
        if self._feed is None:
            return
        if self._judge.state.stop_step is None:  # else it was said when it happened
            rank_zero_info(f"{_NAME}: did not stop this run: {self.stopping_reason}")
        self._result.after_fit(trainer, pl_module, self.onset_step, self.stopped_step)
        if self.action == "stop" and trainer.is_global_zero:
            self._write_report(trainer)

    def _write_report(self, trainer: Trainer) -> None:
        directory = report_directory(trainer)
        if directory is None:
            return
        try:
            write_report(directory, self._report(trainer))
        except Exception as error:  # whatever a file system raises: the run itself ended well
            rank_zero_warn(f"{_NAME}: its report could not be written to {directory} ({error!r}).")

    @guarded
    def _state(self) -> dict[str, Any]:
        return {**self._judge.state_dict(), **self._feed_state(), **self._result.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore; the window follows when training starts and devices are known."""
        try:
            self._judge.load_state_dict(state_dict)
            self._load_feed_state(state_dict)
            self._result.load_state_dict(state_dict)
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"The state of {_NAME} in the checkpoint is damaged: {error!r}. Resume from "
                "another checkpoint."
            ) from error

    def _act_on_verdict(self, trainer: Trainer) -> bool:
        if not can_stop_early(trainer) or not self._judge.accept():
            return False
        if self.action == "stop":
            trainer.should_stop = True
        prefix = "" if self.action == "stop" else "would have "
        rank_zero_info(f"{_NAME}: {prefix}{self.stopping_reason}")
        return True

    def _resume_stopped(self, trainer: Trainer) -> None:
        if self._judge.state.stop_step is None:
            return
        if not can_stop_early(trainer):
            self._judge.judge_anew()
        elif self.action == "stop":
            trainer.should_stop = True
            rank_zero_info(
                f"{_NAME}: the checkpoint's run has {self.stopping_reason}. To train on, set "
                "action='monitor'."
            )

    def _report(self, trainer: Trainer) -> dict[str, Any]:
        return {
            "stopped": self.stopped_step is not None,
            "global_step": trainer.global_step,
            **self._judge.state_dict()["rule"],
            "diagnosis": self._judge.diagnosis,
            "window_steps": self._setup["window_steps"],
            "best_model_path": self.best_model_path,
            "setup": self._setup,
            "settings": {
                **self._settings(),
                "window": self.window,
                "action": self.action,
                "restore": self.restore,
                "accumulator": self.accumulator,
                "epoch_steps": self.epoch_steps,
            },
            "history": self.history,
        }

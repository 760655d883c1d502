"""Stops a Lightning Trainer without validation data."""

import math
from dataclasses import replace
from typing import Any, Literal

import torch
from torch.optim import Optimizer

from poprisk_integrations.core import StoppingConfig, StoppingRule, StoppingState
from poprisk_integrations.distributed import mean_over_ranks
from poprisk_integrations.lightning._upstream import (
    Callback,
    LightningModule,
    Trainer,
    can_stop_early,
    checkpoint_saved_at,
    is_fast_dev_run,
    rank_zero_info,
    rank_zero_warn,
)
from poprisk_integrations.lightning.callbacks.gradient_reader import GradientReader
from poprisk_integrations.lightning.callbacks.onset_checkpoint import (
    check_onset_checkpoint,
    load_weights_back,
    onset_path,
)
from poprisk_integrations.lightning.callbacks.refusals import (
    only_optimizer,
    refuse_scaled_gradients,
    refuse_strategy,
)
from poprisk_integrations.lightning.callbacks.run_length import (
    micro_batches_per_step,
    window_steps,
)

__all__ = ["PopRiskEarlyStopping"]

_ACTIONS = ("stop", "monitor")
_RESTORES = ("stop", "onset", None)
_NONE = -1.0  # in logged metrics, which must be finite numbers


class PopRiskEarlyStopping(Callback):
    """Ends training at `kappa` times the moment when gradients stopped carrying signal.

    F compares the summed gradient of a window of optimizer steps with the noise of its steps
    (`core.window`); when it falls below `threshold`, batches no longer agree on where to go.
    `core.StoppingRule` decides. Any torch optimizer, no validation data, one fp32 buffer of the
    parameters' size.

    Gradients are read in `on_before_optimizer_step`: averaged over micro-batches and ranks,
    unscaled and unclipped. Lightning divides each micro-batch's loss by
    `accumulate_grad_batches` also where an epoch ends early and fewer were summed; such a step is
    left out of the window. A step that the fp16 grad scaler skipped counts for nothing.
    Training time is the sum of learning rates, each read at its step, before schedulers (of
    groups with different ones the largest: the rule compares sums with each other, so a common
    factor cancels).

    The decision is taken after optimizer steps, from numbers that were averaged over ranks, so
    all ranks stop together and report the same reason. It waits for the trainer's `min_epochs`
    and `min_steps`, and is taken back if the signal returns meanwhile. Note that Lightning reads
    `Trainer(min_steps=...)` as at least one whole epoch; `min_steps` of this callback does not.

    Logs `poprisk/signal_ratio` (F of the last window), `poprisk/onset_step` and
    `poprisk/predicted_stop_step` (at the present learning rate) from the first step on, each -1
    while there is none, for loggers and for `ModelCheckpoint(monitor=...)`. The state is in the
    checkpoint, with an unfinished window (fp32, of the parameters' size): a resumed run equals
    one that was never interrupted. Under ModelParallelStrategy an unfinished window starts
    afresh on resume.

    Args:
        kappa: Stop at this multiple of the training time of the onset, >= 1.
        window: Optimizer steps per window, >= 2, or "auto": one epoch, a third of an epoch for
            runs of under eight, a twentieth of the run if the length of an epoch is unknown; at
            least 8 (`diagnostics.auto_window_steps`).
        threshold: F below this is the onset, > 0. An onset counts once F has exceeded 1.05 times
            this; two windows in a row above 1.3 times this take it back.
        min_steps: No stop before this many optimizer steps.
        action: "stop", or "monitor" to log and change nothing.
        restore: Which weights are the run's result. "stop": those of the last step, as they are.
            "onset": those of the onset; a checkpoint is saved there, into ModelCheckpoint's
            directory or `default_root_dir`, and loaded back into the module when `fit` ends.
            None: as "stop", and `best_model_path` stays empty.

    Raises:
        ValueError: If an argument is outside its range.
        MisconfigurationException: When `fit` starts, for manual optimization, DeepSpeed, FSDP1
            (all hide complete gradients; ModelParallelStrategy, FSDP2, does not), and fused
            optimizers under fp16, whose gradients are still scaled.

    Example:
        >>> callback = PopRiskEarlyStopping(kappa=3.0, window=20)
        >>> callback.stopped_step, callback.stopping_reason
        (None, 'no window is complete yet')
    """

    def __init__(
        self,
        kappa: float = 2.0,
        window: int | Literal["auto"] = "auto",
        threshold: float = 1.0,
        min_steps: int = 0,
        action: Literal["stop", "monitor"] = "stop",
        restore: Literal["stop", "onset"] | None = "stop",
    ) -> None:
        if window != "auto" and (type(window) is not int or window < 2):
            raise ValueError(f"Invalid window: {window!r}. Must be 'auto' or an integer >= 2.")
        for name, value, allowed in (("action", action, _ACTIONS), ("restore", restore, _RESTORES)):
            if value not in allowed:
                raise ValueError(f"Invalid {name}: {value!r}. Must be one of {allowed}.")
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
        self._reset()

    def _reset(self) -> None:
        self._rule = StoppingRule(self._config)
        self._verdict: StoppingState | None = None  # due, but the trainer may not stop yet
        self._reader: GradientReader | None = None  # None outside of training
        self._saved_window: dict[str, Any] | None = None
        self._step = 0
        self._lr = 0.0
        self._micro_batches = 0  # since the last optimizer step
        self._logged: tuple[int, dict[str, float]] | None = None  # with the epoch
        self._warned = False
        self._onset_path = ""
        self._stop_path = ""

    @property
    def state_key(self) -> str:
        """Callbacks that differ in what they measure or when they stop keep states apart."""
        c = self._config
        arguments = (c.kappa, self.window, c.threshold, c.min_steps)
        return f"{type(self).__qualname__}{arguments!r}"

    @property
    def stopped_step(self) -> int | None:
        """Optimizer step of the stop; None if this callback stopped nothing."""
        return self._rule.state.stop_step if self.action == "stop" else None

    @property
    def onset_step(self) -> int | None:
        """Optimizer step of the onset; None if there is none."""
        return self._rule.state.onset_step

    @property
    def stopping_reason(self) -> str:
        """One line about the last change of mind, the same on all ranks."""
        return self._rule.state.reason

    @property
    def best_model_path(self) -> str:
        """Checkpoint of the run's result, "" if there is none.

        With `restore="onset"` the onset's; with "stop", after `fit`, the one that a
        ModelCheckpoint saved at the stop.
        """
        return {"onset": self._onset_path, "stop": self._stop_path}.get(str(self.restore), "")

    def metrics(self) -> dict[str, float]:
        """The present values of all that this callback logs; -1 for none."""
        values = {
            "poprisk/signal_ratio": self._rule.state.signal_ratio,
            "poprisk/onset_step": self.onset_step,
            "poprisk/predicted_stop_step": self._rule.predicted_stop_step(self._step, self._lr),
        }
        return {name: _NONE if value is None else float(value) for name, value in values.items()}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what hides gradients, and start afresh: a checkpoint is loaded after this."""
        if stage == "fit":
            self._reset()
            refuse_strategy(trainer, self.restore)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the window, or continue the checkpoint's."""
        optimizer = only_optimizer(trainer, pl_module)
        refuse_scaled_gradients(trainer, optimizer)
        if is_fast_dev_run(trainer):
            return
        if self._saves_onset:
            check_onset_checkpoint(trainer, self.onset_step, self._onset_path)
        steps = window_steps(trainer, self.window, must_stop=self.action == "stop")
        self._reader = GradientReader(optimizer, steps)
        self._step = trainer.global_step
        saved, self._saved_window = self._saved_window, None
        lost = self._reader.resume(saved) if trainer.global_step > 0 else None
        if lost is not None:
            rank_zero_warn(
                f"PopRiskEarlyStopping: {lost}. An unfinished window starts afresh, so the stop "
                "may come at another step."
            )
        if self._rule.state.stop_step is not None:
            self._resume_stopped(trainer)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count micro-batches. The count is not saved: Lightning drops their gradients too."""
        self._micro_batches += 1

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Take in this step's gradients and learning rate."""
        is_complete = self._micro_batches == micro_batches_per_step(trainer)
        self._micro_batches = 0
        if self._reader is not None:
            self._reader.read(optimizer, count=is_complete)
            self._lr = self._reader.lr

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Decide after an optimizer step, and log."""
        if self._reader is None or trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        lr = self._reader.take_lr()
        ratio = self._close_window(trainer) if self._reader.window.is_full else None
        before = self._rule.state
        if before.onset_step is not None:
            lr = _over_ranks(trainer, lr)  # from here on any step may be the last
        decision = self._rule.update(step=self._step, lr=lr, ratio=ratio)
        self._verdict = None
        if decision.stop and before.stop_step is None:
            # Taken back until the trainer may act on it: the rule never changes a verdict.
            self._verdict = self._rule.state
            self._rule.state = replace(self._rule.state, stop_step=None, reason=before.reason)
            self._act_on_verdict(trainer)
        if decision.onset and self._saves_onset:
            self._onset_path = onset_path(trainer, self._step)
            trainer.save_checkpoint(self._onset_path, weights_only=False)
        elif self.onset_step is None:
            self._onset_path = ""
        self._log(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Act on a verdict that had to wait for the end of the epoch."""
        self._act_on_verdict(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where the result is; load the onset's weights back."""
        if self._reader is None:
            return
        if self._saves_onset and self._onset_path:
            load_weights_back(pl_module, self._onset_path)
            rank_zero_info(
                f"PopRiskEarlyStopping: loaded the weights of step {self.onset_step} back from "
                f"{self._onset_path}"
            )
        if self.stopped_step is not None:
            step, callbacks = self.stopped_step, trainer.checkpoint_callbacks
            paths = (checkpoint_saved_at(callback, step) for callback in callbacks)
            self._stop_path = next(filter(None, paths), self._stop_path)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Let go of the optimizer."""
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the optimizer and of its device's memory."""
        self._release()

    def state_dict(self) -> dict[str, Any]:
        """Numbers, strings, None and tensors: safe for `weights_only` loading."""
        window = self._saved_window
        if self._reader is not None:
            window = self._reader.state_dict()
        return {
            "rule": self._rule.state_dict(),
            "window": window,
            "onset_path": self._onset_path,
            "stop_path": self._stop_path,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore; the window follows when training starts and devices are known."""
        self._rule.load_state_dict(state_dict["rule"])
        self._saved_window = state_dict["window"]
        self._onset_path = state_dict["onset_path"]
        self._stop_path = state_dict["stop_path"]

    @property
    def _saves_onset(self) -> bool:
        return self.action == "stop" and self.restore == "onset"

    def _resume_stopped(self, trainer: Trainer) -> None:
        if not can_stop_early(trainer):
            self._rule.state = replace(self._rule.state, stop_step=None)
        elif self.action == "stop":
            trainer.should_stop = True
            rank_zero_info(
                f"PopRiskEarlyStopping: the checkpoint's run has {self.stopping_reason}. To train "
                "on, set action='monitor'."
            )

    def _close_window(self, trainer: Trainer) -> float:
        assert self._reader is not None
        closed = self._reader.window.close()
        # A scheduler fed with numbers of one rank only would let training times drift apart.
        lr_sum = _over_ranks(trainer, self._rule.state.lr_sum)
        self._rule.state = replace(self._rule.state, lr_sum=lr_sum)
        ratio = math.nan if closed is None else closed.ratio
        if math.isnan(ratio) and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"PopRiskEarlyStopping: the window that ended at step {self._step} had fewer than "
                "two steps with finite, varying gradients and does not count."
            )
        return ratio

    def _act_on_verdict(self, trainer: Trainer) -> None:
        if self._verdict is None or not can_stop_early(trainer):
            return
        self._rule.state, self._verdict = self._verdict, None
        if self.action == "stop":
            trainer.should_stop = True
        prefix = "" if self.action == "stop" else "would have "
        rank_zero_info(f"PopRiskEarlyStopping: {prefix}{self.stopping_reason}")

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        values = self.metrics()
        # Lightning keeps a value until the epoch ends, and its `log` takes a millisecond.
        if trainer.barebones or self._logged == (trainer.current_epoch, values):
            return
        self._logged = (trainer.current_epoch, values)
        pl_module.log_dict(values, on_step=True, on_epoch=False, batch_size=1)

    def _release(self) -> None:
        if self._reader is not None:
            self._saved_window = self._reader.release()
            self._reader = None


def _over_ranks(trainer: Trainer, value: float) -> float:
    if trainer.world_size == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=trainer.strategy.root_device)
    return float(mean_over_ranks(tensor))

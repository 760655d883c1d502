"""Stops a Trainer without validation data."""

import logging
import math
import os
import sys
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from poprisk_integrations.core import StoppingConfig, StoppingDecision, StoppingRule
from poprisk_integrations.diagnostics import GradientWindow, auto_window_steps
from poprisk_integrations.distributed import is_dtensor, mean_over_ranks
from poprisk_integrations.huggingface.callbacks.best_checkpoint import (
    check_restore,
    forget_best,
    keep_best_path,
    mark_best,
)
from poprisk_integrations.huggingface.callbacks.epoch_length import steps_per_epoch
from poprisk_integrations.huggingface.callbacks.exported_state import (
    add_exported_state,
    find_exported_state,
)
from poprisk_integrations.huggingface.callbacks.gate_metrics import gate_metrics, sample_gate_stats
from poprisk_integrations.huggingface.callbacks.log_metrics import add_to_log
from poprisk_integrations.huggingface.callbacks.stop_report import write_stop_report
from poprisk_integrations.huggingface.callbacks.window_checkpoint import (
    WINDOW_FILE,
    load_window,
    save_window,
)
from poprisk_integrations.huggingface.registration import checkpoint_directory

__all__ = ["PopRiskEarlyStoppingCallback"]

logger = logging.getLogger(__name__)

_ACTIONS = ("stop", "monitor")
_RESTORES = ("stop", "onset", None)
_STATS_EVERY = 50


class PopRiskEarlyStoppingCallback(TrainerCallback, ExportableState):
    """Ends training at `kappa` times the moment when gradients stopped carrying signal.

    F compares the summed gradient of a window of optimizer steps with the noise of its steps
    (`core.window`); when it falls below `threshold`, batches no longer agree on where to go.
    `core.StoppingRule` decides. Any torch optimizer, no eval set, one gradient-sized buffer.

    Gradients are read right before the optimizer step: averaged over micro-batches and ranks,
    unscaled, and already clipped. Clipping by global norm scales all tensors of a step alike, so
    it reweights steps against each other within a window; `max_grad_norm=0` avoids that.
    Training time is the sum of learning rates (of groups with different ones the largest:
    the rule compares sums with each other, so a common factor cancels). A step that the fp16
    grad scaler skipped counts for nothing.

    Logs `poprisk/signal_ratio` (F of the last window), `poprisk/onset_step`,
    `poprisk/predicted_stop_step` (at the present learning rate) and PopRiskAdamW's gate
    statistics in Trainer's log lines and `state.log_history`; in trackers with
    `PopRiskTrainerMixin` only, since trackers see a line before any callback of the user. Writes
    `poprisk_stop.json` to the output directory when training ends. A resumed run continues as if
    it had never been interrupted: the rule's numbers are in `trainer_state.json`, an unfinished
    window in the checkpoint's `poprisk_window.safetensors` (of sharded models it starts afresh).

    Args:
        kappa: Stop at this multiple of the training time of the onset, >= 1.
        window: Optimizer steps per window, >= 2, or "auto": one epoch, a third of an epoch for
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

    Raises:
        ValueError: If an argument is outside its range; at the start of training if `restore`
            does not fit the training arguments, or under DeepSpeed, which hides gradients.

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
    ) -> None:
        if window != "auto" and (type(window) is not int or window < 2):
            raise ValueError(f"Invalid window: {window!r}. Must be 'auto' or an integer >= 2.")
        for name, value, allowed in (("action", action, _ACTIONS), ("restore", restore, _RESTORES)):
            if value not in allowed:
                raise ValueError(f"Invalid {name}: {value!r}. Must be one of {allowed}.")
        self.kappa = kappa
        self.window = window
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
        self._window: GradientWindow | None = None
        self._optimizer: Any = None
        self._step = 0
        self._lr = 0.0
        self._warned = False
        self.window_seen = 0  # steps in the unfinished window

    @property
    def stopping_state(self) -> dict[str, Any]:
        """What the rule remembers, see `core.StoppingState`."""
        return self._rule.state_dict()

    @stopping_state.setter
    def stopping_state(self, value: dict[str, Any]) -> None:
        self._rule.load_state_dict(value)

    def state(self) -> dict[str, Any]:
        """Arguments and numbers for `trainer_state.json`."""
        names = ("kappa", "window", "threshold", "min_steps", "action", "restore")
        return {
            "args": {name: getattr(self, name) for name in names},
            "attributes": {"stopping_state": self.stopping_state, "window_seen": self.window_seen},
        }

    def metrics(self) -> dict[str, float]:
        """The present values of all that this callback logs."""
        values = {
            "poprisk/signal_ratio": self._rule.state.signal_ratio,
            "poprisk/onset_step": self._rule.state.onset_step,
            "poprisk/predicted_stop_step": self._rule.predicted_stop_step(self._step, self._lr),
        }
        known = {name: value for name, value in values.items() if value is not None}
        return {**known, **gate_metrics(self._optimizer)}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the settings, then start afresh or continue from the checkpoint."""
        if getattr(args, "deepspeed_plugin", None) is not None:
            raise ValueError(
                "PopRiskEarlyStoppingCallback cannot run under DeepSpeed, which shows no gradients "
                "to callbacks. Remove the callback, or train with DDP or FSDP."
            )
        if self.action == "stop":
            check_restore(self.restore, args)
        self._optimizer = kwargs["optimizer"]
        sample_gate_stats(self._optimizer, _STATS_EVERY, override=False)
        steps = self.window
        if not isinstance(steps, int):
            epoch = steps_per_epoch(
                kwargs.get("train_dataloader"), args.gradient_accumulation_steps
            )
            steps = auto_window_steps(state.max_steps, epoch)
        self._window = GradientWindow(steps)
        self._rule = StoppingRule(self._config)
        self._step, self._lr, self._warned = state.global_step, _largest_lr(self._optimizer), False
        self.window_seen = 0
        if state.global_step > 0:
            self._resume(args, state)
        add_exported_state(state, self)
        if state.max_steps < 2 * steps:
            _warn(
                state,
                f"the run has {state.max_steps} steps, fewer than two windows of {steps}: it can "
                "never stop early. Set a smaller window.",
            )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take in this step's gradients and learning rate, before the scheduler changes it."""
        assert self._window is not None
        self._window.add(_parameters(self._optimizer))
        self._lr = _largest_lr(self._optimizer)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Decide: from numbers that are the same on all ranks, so all decide alike."""
        assert self._window is not None
        was_skipped = bool(getattr(self._optimizer, "step_was_skipped", False))
        self._step = state.global_step
        self.window_seen += 1
        ratio = None
        if self._window.is_full:
            self.window_seen = 0
            closed = self._window.close()
            ratio = None if closed is None else closed.ratio
            self._warn_of_empty_window(state, ratio)
        before = self._rule.state
        decision = self._rule.update(
            step=state.global_step, lr=0.0 if was_skipped else self._lr, ratio=ratio
        )
        stops_now = decision.stop and before.stop_step is None
        if self.action == "stop":
            forgotten = before.onset_step is not None and self._rule.state.onset_step is None
            self._act(args, state, control, decision, stops_now=stops_now, forgotten=forgotten)
        if stops_now and state.is_world_process_zero:
            verdict = decision.reason if self.action == "stop" else f"would have {decision.reason}"
            tqdm.write(f"poprisk: {verdict}", file=sys.stderr)  # leaves progress bars whole
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the present values to a training log line."""
        add_to_log(self.metrics(), logs, state)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the unfinished window beside Trainer's files."""
        if self.action == "stop":
            keep_best_path(args, state)
        directory = os.path.join(str(args.output_dir), f"checkpoint-{state.global_step}")
        if not (self._window and self.window_seen and args.should_save):
            return
        if os.path.isdir(directory) and not _is_sharded(args, self._optimizer):
            save_window(self._window, directory, state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write `poprisk_stop.json` and let go of the optimizer and the window."""
        if state.is_world_process_zero and self._window is not None:
            rule = self._rule.state
            report = {
                "stopped": rule.stop_step is not None and self.action == "stop",
                "global_step": state.global_step,
                **self.stopping_state,
                "window_steps": self._window.steps,
                "best_model_checkpoint": state.best_model_checkpoint,
                "settings": self.state()["args"],
            }
            write_stop_report(str(args.output_dir), report)
        self._optimizer = self._window = None

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
        if decision.stop:
            control.should_training_stop = True

    def _resume(self, args: TrainingArguments, state: TrainerState) -> None:
        saved = find_exported_state(state, self)
        if saved is None:
            _warn(
                state,
                "the checkpoint has no state of this callback; training time counts from step "
                f"{state.global_step}.",
            )
            return
        self.stopping_state = saved["stopping_state"]
        if self._rule.state.stop_step is not None and self.action == "stop":
            _warn(
                state,
                f"this run had stopped at step {self._rule.state.stop_step}; Trainer takes one "
                "more step before it can stop again.",
            )
        if not saved.get("window_seen"):
            return
        assert self._window is not None
        directory = checkpoint_directory(state)
        found = None
        if directory is not None and not _is_sharded(args, self._optimizer):
            found = load_window(directory, state.global_step, _parameters(self._optimizer))
        # One rank without it and all start afresh: windows must close together.
        ranks_with_it = torch.tensor(float(found is not None), device=args.device)
        if float(mean_over_ranks(ranks_with_it)) == 1.0 and found is not None:
            self._window.load_state_dict(found)
            self.window_seen = int(found["seen"])
        else:
            _warn(
                state,
                f"no {WINDOW_FILE} of step {state.global_step} in the checkpoint: the unfinished "
                "window starts afresh, so the stop may come at another step.",
            )

    def _warn_of_empty_window(self, state: TrainerState, ratio: float | None) -> None:
        if (ratio is None or math.isnan(ratio)) and not self._warned:
            self._warned = True
            _warn(
                state,
                f"the window that ended at step {state.global_step} had fewer than two steps with "
                "finite, varying gradients and does not count.",
            )


def _parameters(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _largest_lr(optimizer: Any) -> float:
    return max((float(g["lr"]) for g in optimizer.param_groups if g["params"]), default=0.0)


def _is_sharded(args: TrainingArguments, optimizer: Any) -> bool:
    return bool(args.fsdp) or any(is_dtensor(p) for p in _parameters(optimizer))


def _warn(state: TrainerState, message: str) -> None:
    if state.is_world_process_zero:
        logger.warning("PopRiskEarlyStoppingCallback: %s", message)

"""What callbacks with windows of gradients have in common: reading, resuming, logging."""

import logging
import math
import os
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from poprisk_integrations.core.window import WindowRatio
from poprisk_integrations.diagnostics import auto_window_steps
from poprisk_integrations.huggingface.callbacks.epoch_length import is_second_pass, steps_per_epoch
from poprisk_integrations.huggingface.callbacks.exported_state import (
    add_exported_state,
    find_exported_state,
    forget_older_exports,
    place_in_run,
)
from poprisk_integrations.huggingface.callbacks.gradient_reader import GradientReader
from poprisk_integrations.huggingface.callbacks.run_progress import RunProgress
from poprisk_integrations.huggingface.callbacks.window_arguments import check_window_arguments
from poprisk_integrations.huggingface.callbacks.window_checkpoint import (
    all_ranks_have,
    load_window,
    save_window,
)
from poprisk_integrations.huggingface.log_metrics import MetricsCallback
from poprisk_integrations.huggingface.registration import checkpoint_directory

__all__ = ["WindowCallback"]

logger = logging.getLogger(__name__)


class WindowCallback(MetricsCallback, ExportableState):
    """Reads the gradients of each step and hands closed windows to a rule.

    A subclass sets `_rule` (with `state_dict` and `load_state_dict`) before it calls this
    constructor, and implements `_after_step`, `state` and `metrics`.

    Args:
        window: Optimizer steps per window, >= 4, or "auto" (`diagnostics.auto_window_steps`), or
            "third": a third of a pass, however long the run.
        accumulator: "auto", "exact" or "sample", see `diagnostics.GradientWindow`.
        epoch_steps: Optimizer steps of one pass over the data; None for the data loader's length.

    Attributes:
        progress: What is remembered beside the rule's numbers.
    """

    _rule: Any
    _acts = "stop early"
    _window_name = "poprisk_window"

    def __init__(
        self, window: int | str = "auto", accumulator: str = "auto", epoch_steps: int | None = None
    ) -> None:
        check_window_arguments(window, accumulator, epoch_steps)
        self.window = window
        self.accumulator = accumulator
        self.epoch_steps = epoch_steps
        self.progress = RunProgress()
        self._reader: GradientReader | None = None
        self._epoch_steps = epoch_steps
        self._place = 1
        self._has_warned: set[str] = set()

    @property
    def rule_state(self) -> dict[str, Any]:
        """What the rule remembers."""
        state: dict[str, Any] = self._rule.state_dict()
        return state

    @rule_state.setter
    def rule_state(self, value: dict[str, Any]) -> None:
        self._rule.load_state_dict(value)

    @property
    def progress_state(self) -> dict[str, Any]:
        """`progress` in plain numbers."""
        return self.progress.state_dict()

    @progress_state.setter
    def progress_state(self, value: dict[str, Any]) -> None:
        self.progress = RunProgress.from_state_dict(value)

    def _state(self, *names: str) -> dict[str, Any]:
        """Arguments of these names and all numbers, for `trainer_state.json`."""
        return {
            "args": {name: getattr(self, name) for name in names},
            "attributes": {"rule_state": self.rule_state, "progress_state": self.progress_state},
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start afresh, or continue from the checkpoint."""
        self._place = place_in_run(state, type(self).__name__)
        loader = kwargs.get("train_dataloader")
        epoch = self.epoch_steps or steps_per_epoch(loader, args.gradient_accumulation_steps)
        window = self.window
        run_steps = epoch if window == "third" and epoch is not None else state.max_steps
        steps = window if isinstance(window, int) else auto_window_steps(run_steps, epoch)
        self._epoch_steps = epoch
        self._has_warned = set()
        self._reader = GradientReader(
            args,
            kwargs["optimizer"],
            kwargs.get("model"),
            steps=steps,
            accumulator=self.accumulator,
            epoch_steps=epoch,
        )
        self._rule.load_state_dict({})
        self.progress = RunProgress()
        shape = {
            "world size": args.world_size,
            "per-device batch size": args.per_device_train_batch_size,
            "accumulation steps": args.gradient_accumulation_steps,
            "window steps": steps,
        }
        if state.global_step > 0:
            self._resume(args, state, shape)
        self.progress.shape = shape
        self.progress.window_file = "" if self._reader.is_sharded else self._window_file
        add_exported_state(state, self)
        if state.max_steps < 2 * steps:
            self._warn(
                state,
                f"the run has {state.max_steps} steps, fewer than two windows of {steps}: it can "
                f"never {self._acts}. Set a smaller window.",
            )

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A pass over data without a length has ended."""
        if self._epoch_steps is None:
            self.progress.passes += 1

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take in this step's gradients and learning rate, before the scheduler changes it."""
        assert self._reader is not None
        if self.progress.window_seen == 0:
            self.progress.window_reused = is_second_pass(
                state.global_step, self._epoch_steps, self.progress.passes
            )
        self._reader.read()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Close a full window, and let the rule decide: on all ranks from the same numbers."""
        assert self._reader is not None
        self.progress.window_seen += 1
        window = None
        if self._reader.window.is_full:
            self.progress.window_seen = 0
            window = self._reader.close()
            if window is None or math.isnan(window.ratio):
                self._warn_once(
                    state,
                    "empty",
                    f"the window that ended at step {state.global_step} had fewer than four steps "
                    "with finite, varying gradients and does not count.",
                )
            verdict = self._reader.clipping.verdict()
            if verdict is not None:
                self._warn_once(state, "clipped", verdict)
        self._after_step(args, state, control, window, kwargs)
        return control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the window beside Trainer's files: even an empty one knows the last step."""
        forget_older_exports(state, self)
        reader = self._reader
        if reader is None or not args.should_save:
            return
        directory = os.path.join(str(args.output_dir), f"checkpoint-{state.global_step}")
        if os.path.isdir(directory) and not reader.is_sharded:
            save_window(reader.window, directory, state.global_step, self._window_file)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go of the optimizer and the window."""
        self._reader = None

    def grad_norm(self, norm: Any) -> None:
        """Undo the clipping of the step to come."""
        if self._reader is not None:
            self._reader.clipping.note_norm(norm)

    def _after_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        window: WindowRatio | None,
        kwargs: dict[str, Any],
    ) -> None:
        """Let the rule decide. `window` is the one that closed with this step."""
        raise NotImplementedError

    @property
    def _window_file(self) -> str:
        """One name per callback of a run."""
        number = "" if self._place == 1 else f"_{self._place}"
        return f"{self._window_name}{number}.safetensors"

    def _resume(self, args: TrainingArguments, state: TrainerState, shape: dict[str, int]) -> None:
        try:
            saved = find_exported_state(state, self)
            if saved is not None:
                self.rule_state = saved.get("rule_state", {})
                self.progress_state = saved.get("progress_state", {})
                changes = self.progress.changes(shape)
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"The state of {type(self).__name__} in the checkpoint's trainer_state.json "
                f"({checkpoint_directory(state)!r}) is damaged: {error!r}. Resume from another one."
            ) from error
        if saved is None:
            self._warn(
                state,
                "the checkpoint has no state of this callback; training time counts from step "
                f"{state.global_step}.",
            )
            return
        if changes:
            self._warn(
                state,
                f"resumed with {changes}: training time continues, the unfinished window starts "
                "afresh.",
            )
        elif not self._load_window(args, state) and self.progress.window_seen:
            self._warn(
                state,
                f"no {self._window_file} of step {state.global_step} in the checkpoint: the "
                "unfinished window starts afresh, so what follows may come at another step.",
            )
        else:
            return
        self.progress.window_seen = 0

    def _load_window(self, args: TrainingArguments, state: TrainerState) -> bool:
        assert self._reader is not None
        reader, directory = self._reader, checkpoint_directory(state)
        found = None
        if directory is not None and not reader.is_sharded:
            found = load_window(
                directory, state.global_step, reader.parameters(), self._window_file
            )
        if not all_ranks_have(found, args.device) or found is None:
            return False
        reader.window.load_state_dict(found)
        return True

    def _warn(self, state: TrainerState, message: str) -> None:
        if state.is_world_process_zero:
            logger.warning("%s: %s", type(self).__name__, message)

    def _warn_once(self, state: TrainerState, topic: str, message: str) -> None:
        if topic not in self._has_warned:
            self._has_warned.add(topic)
            self._warn(state, message)

"""What callbacks with windows of gradients have in common: reading, resuming, logging."""

import logging
import math
import os
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from poprisk_integrations.core.window import WindowRatio
from poprisk_integrations.diagnostics.guard import Guarded, guarded
from poprisk_integrations.huggingface.callbacks.exported_state import (
    add_exported_state,
    find_exported_state,
    forget_older_exports,
    place_in_run,
)
from poprisk_integrations.huggingface.callbacks.gradient_reader import GradientReader
from poprisk_integrations.huggingface.callbacks.pass_count import PassCount, WindowPlan
from poprisk_integrations.huggingface.callbacks.run_progress import RunProgress
from poprisk_integrations.huggingface.callbacks.window_arguments import check_window_arguments
from poprisk_integrations.huggingface.callbacks.window_checkpoint import (
    all_ranks_have,
    load_window,
    save_window,
)
from poprisk_integrations.huggingface.log_metrics import MetricsCallback
from poprisk_integrations.huggingface.registration import checkpoint_directory
from poprisk_integrations.huggingface.run_facts import batch_size_of, checkpoint_path

__all__ = ["WindowCallback"]

logger = logging.getLogger(__name__)


_RESTARTS_TO_SAY = 3


class WindowCallback(Guarded, MetricsCallback, ExportableState):
    """Reads the gradients of each step and hands closed windows to a rule.

    A subclass sets `_rule` (with `state_dict` and `load_state_dict`) before it calls this
    constructor, and implements `_after_step`, `state` and `metrics`.

    Args:
        window: Optimizer steps per window, >= 4, or "auto" (`diagnostics.auto_window_steps`), or
            "third": a third of a pass, however long the run.
        accumulator: "auto", "exact" or "sample", see `diagnostics.GradientWindow`.
        epoch_steps: Optimizer steps of one pass over the data; None for what the data loader
            shows (`diagnostics.data_pass`).

    Attributes:
        progress: What is remembered beside the rule's numbers.
    """

    _rule: Any
    _acts = "stop early"
    _may_refuse = True  # before step 1 only, settings that it cannot work with
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
        self._passes = PassCount(None, epoch_steps)
        self._plan = WindowPlan(window=0, epoch_steps=epoch_steps, accumulation=1)
        self._has_begun = False
        self._drawn_before = 0
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
        numbers = self._numbers() or {}
        return {"args": {name: getattr(self, name) for name in names}, "attributes": numbers}

    @guarded
    def _numbers(self) -> dict[str, Any]:
        return {"rule_state": self.rule_state, "progress_state": self.progress_state}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start afresh, or continue from the checkpoint."""
        self._place = place_in_run(state, type(self).__name__)
        self._has_begun, self._has_warned, self._reader = True, set(), None
        self.switched_off = None
        self._rule.load_state_dict({})
        self.progress = RunProgress()
        saved = self._saved(state) if state.global_step > 0 else None
        add_exported_state(state, self)
        self._passes = PassCount(kwargs.get("train_dataloader"), self.epoch_steps, args.device)
        plan = self._passes.plan(self.window, state.max_steps, args.gradient_accumulation_steps)
        try:
            self._reader = GradientReader(
                args,
                kwargs["optimizer"],
                kwargs.get("model"),
                steps=plan.window,
                accumulator=self.accumulator,
                epoch_steps=plan.epoch_steps,
            )
        except ValueError as error:
            if self._may_refuse:
                raise
            self._warn(state, f"watches nothing in this run. {error}")
            return
        self._plan = plan
        shape = {
            "world size": args.world_size,
            "per-device batch size": batch_size_of(args, state),
            "accumulation steps": args.gradient_accumulation_steps,
            "window steps": plan.window,
        }
        if state.global_step > 0:
            self._resume(args, state, saved, shape)
        drawn = state.global_step * args.gradient_accumulation_steps
        self.progress.continue_with(self._passes.found.batches, drawn)
        self.progress.shape = shape
        self.progress.window_file = "" if self._reader.is_sharded else self._window_file
        self._say_at_start(state)

    @guarded
    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the data again, which a callback may have changed."""
        if self._begin_late(args, state, control, kwargs) or self._reader is None:
            return
        self._passes = PassCount(kwargs.get("train_dataloader"), self.epoch_steps, args.device)
        self._follow(args, state)

    @guarded
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note where a window would begin."""
        self._begin_late(args, state, control, kwargs)
        self._drawn_before = self.progress.batches or 0

    @guarded
    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count a micro-batch that makes no step yet."""
        self._count_batch()

    @guarded
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take in this step's gradients and learning rate, before the scheduler changes it."""
        if self._reader is None:
            return
        if args.gradient_accumulation_steps != self._plan.accumulation:
            self._follow(args, state)
        self._reader.read()
        window = self._reader.window
        if window.seen == 1:  # also where the trained parameters have changed
            drawn = self._drawn_before
            self.progress.window_reused = self._passes.is_over(state.global_step, drawn)
        if window.restarts >= _RESTARTS_TO_SAY and window.seen == 1:
            self._warn_once(
                state,
                "restarts",
                f"the trained parameters have changed {window.restarts} times before a window of "
                f"{window.steps} steps was full, at last after {self.progress.window_seen} steps: "
                f"as long as that goes on it can not {self._acts}. Set a smaller window.",
            )

    @guarded
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Close a full window, and let the rule decide: on all ranks from the same numbers."""
        self._count_batch()
        if self._begin_late(args, state, control, kwargs) or self._reader is None:
            return control
        self.progress.window_seen = self._reader.window.seen
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
            self._tell_clipping(state)
        self._after_step(args, state, control, window, kwargs)
        return control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the window beside Trainer's files: even an empty one knows the last step."""
        forget_older_exports(state, self)
        reader, directory = self._reader, checkpoint_path(args, state)
        is_whole_here = reader is not None and not reader.is_sharded and args.should_save
        if reader is None or not is_whole_here or not os.path.isdir(directory):
            return
        try:
            save_window(reader.window, directory, state.global_step, self._window_file)
        except Exception as error:  # a full disk, in whichever words; the model is saved
            self._warn_once(
                state,
                "unsaved",
                f"{self._window_file} could not be written to {directory!r} ({error}): a run that "
                "resumes from there starts its window afresh.",
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go of the optimizer and the window."""
        self._reader, self._has_begun = None, False

    def switch_off(self, where: str, error: Exception) -> None:
        """Do nothing from here on, and let go of the optimizer."""
        self._reader = None
        super().switch_off(where, error)

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

    def _follow(self, args: TrainingArguments, state: TrainerState) -> None:
        """Plan anew where the accumulation or the data have changed."""
        plan = self._passes.plan(self.window, state.max_steps, args.gradient_accumulation_steps)
        if plan != self._plan:
            assert self._reader is not None
            self._plan = plan
            self._reader.plan(plan.window, plan.epoch_steps)
            self.progress.shape |= {
                "accumulation steps": plan.accumulation,
                "window steps": plan.window,
            }
        self.progress.pass_batches = self._passes.found.batches

    def _begin_late(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, kwargs: Any
    ) -> bool:
        """Begin now, if this callback was added to a run that had begun."""
        if self._has_begun:
            return False
        self.on_train_begin(args, state, control, **kwargs)
        return True

    def _count_batch(self) -> None:
        self.progress.batches = (self.progress.batches or 0) + 1

    def _say_at_start(self, state: TrainerState) -> None:
        """One line about what can be done in this run."""
        steps = self._plan.window
        if state.max_steps < 2 * steps:
            self._warn(
                state,
                f"the run has {state.max_steps} steps, fewer than two windows of {steps}: it can "
                f"never {self._acts}. Set a smaller window.",
            )

    def _tell_clipping(self, state: TrainerState) -> None:
        assert self._reader is not None
        clipping = self._reader.clipping
        if clipping.matters:
            self._warn_once(state, "clipped", str(clipping.verdict()))
        elif clipping.clipped and "clipped" not in self._has_warned and state.is_world_process_zero:
            self._has_warned.add("clipped")
            logger.info("%s: %s", type(self).__name__, clipping.verdict())

    def _saved(self, state: TrainerState) -> dict[str, Any] | None:
        try:
            return find_exported_state(state, self)
        except (LookupError, TypeError, AttributeError) as error:
            raise self._damaged(state, error) from error

    def _damaged(self, state: TrainerState, error: Exception) -> ValueError:
        return ValueError(
            f"The state of {type(self).__name__} in the checkpoint's trainer_state.json "
            f"({checkpoint_directory(state)!r}) is damaged: {error!r}. Resume from another one."
        )

    def _resume(
        self,
        args: TrainingArguments,
        state: TrainerState,
        saved: dict[str, Any] | None,
        shape: dict[str, int],
    ) -> None:
        if saved is None:
            self._warn(
                state,
                "the checkpoint has no state of this callback; training time counts from step "
                f"{state.global_step}.",
            )
            return
        try:
            self.rule_state = saved.get("rule_state", {})
            self.progress_state = saved.get("progress_state", {})
            changes = self.progress.changes(shape)
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise self._damaged(state, error) from error
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

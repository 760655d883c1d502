"""Gradients of a run of Trainer, read in windows; the unfinished one is in the checkpoints."""

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from poprisk_integrations._files import write_whole
from poprisk_integrations.core.window import WindowRatio
from poprisk_integrations.diagnostics.data_pass import batch_count, data_pass
from poprisk_integrations.diagnostics.gradient_window import (
    BY_POSITION,
    GradientWindow,
    empty_state,
    window_fits,
)
from poprisk_integrations.diagnostics.run_length import RunPlan, agree_on
from poprisk_integrations.distributed import mean_over_ranks
from poprisk_integrations.huggingface.callbacks.gradients import TrainerGradients
from poprisk_integrations.huggingface.checkpoints import read_saved
from poprisk_integrations.huggingface.run_callback import Voice
from poprisk_integrations.huggingface.run_facts import (
    Moment,
    batch_size_of,
    checkpoint_directory,
    checkpoint_path,
)

__all__ = ["WINDOW_FILE", "Windows", "load_window", "save_window"]

WINDOW_FILE = "poprisk_window.safetensors"

logger = logging.getLogger(__name__)


class Windows:
    """Reads the gradients of each step; subclasses take closed windows in `_after_step`.

    Windows follow the data, the accumulation and the batch size, which may change under way.

    `options` have `window`, `accumulator` and `epoch_steps`; `reader` is what reads them.
    """

    without_file = "starts its window afresh"
    _stem = "poprisk_window"  # of its file in checkpoints

    def __init__(self, options: Any, now: Moment, voice: Voice) -> None:
        self._options, self._voice, self.file = options, voice, voice.file(self._stem)
        self._look_at_data(now)
        self.reader = TrainerGradients(
            now, self._plan(now), accumulator=options.accumulator, warn=voice.warn
        )

    @property
    def history(self) -> list[dict[str, Any]]:
        """One row per window, of a subclass that keeps them."""
        return []

    @property
    def progress_state(self) -> dict[str, Any]:
        """Beside the rule's numbers and the window: where in the data, and how it was measured."""
        reader, batches = self.reader, self.reader.plan.pass_batches
        return {
            "window_seen": reader.window.seen,
            "window_reused": reader.reused,
            "batches": round(reader.passes * batches) if batches else None,
            "pass_batches": batches,
            "window_file": "" if reader.is_sharded else self.file,  # which a checkpoint must have
            "shape": reader.setup,
            "history": list(self.history),
        }

    def epoch_begins(self, now: Moment) -> None:
        """Look at the data again, which a callback may have changed."""
        self._look_at_data(now)
        self._follow(now)

    def substep_ends(self, now: Moment) -> None:
        """Count a micro-batch that makes no step yet."""
        self.reader.count_batch()

    def before_optimizer_step(self, now: Moment) -> None:
        """Take in this step's gradients and learning rate, before the scheduler changes it."""
        # A callback may have changed it, as those that let batches grow do.
        if now.args.gradient_accumulation_steps != self.reader.plan.accumulation:
            self._follow(now)
        self.reader.read_step(now)

    def step_ends(self, now: Moment) -> None:
        """Close a full window."""
        reader, window = self.reader, None
        reader.count_batch()
        reader.step_ends()
        if reader.window.is_full:
            window = reader.close(now.state.global_step)
            if reader.clipping.matters:
                self._voice.warn(str(reader.clipping.verdict()), topic="clipped")
        self._after_step(now, window)

    def resume(self, now: Moment, saved: dict[str, Any] | None) -> None:
        """Continue the checkpoint's window, with one warning at most."""
        step, reader = now.state.global_step, self.reader
        known: dict[str, Any] = {"window": None, "reused": False, "passes": None}
        if saved is None:
            reader.resume(known, step, {})
            self._voice.warn(
                "the checkpoint has no state of this callback; training time counts from step "
                f"{step}."
            )
            return
        progress = saved.get("progress_state", {})  # older versions wrote less of it
        self._continue(saved.get("rule_state") or {}, progress.get("history", []))
        if progress.get("batches") is not None and progress.get("pass_batches"):
            known["passes"] = progress["batches"] / progress["pass_batches"]
        known["reused"] = progress.get("window_reused", False)
        was_open, directory = progress.get("window_seen", 0) > 0, checkpoint_directory(now.state)
        if directory is not None and not reader.is_sharded:
            known["window"] = load_window(directory, step, reader.parameters(), self.file)
        # If one rank has none all start afresh, to close together.
        has_window = torch.tensor(float(known["window"] is not None), device=now.args.device)
        if float(mean_over_ranks(has_window)) < 1.0:
            known["window"] = None
        warning = reader.resume(known, step, progress.get("shape", {}), was_open=was_open)
        if warning is None and known["window"] is None and was_open:
            warning = (
                f"no {self.file} of step {step} in the checkpoint: the unfinished window starts "
                "afresh, so what follows may come at another step."
            )
        if warning is not None:
            self._voice.warn(warning)

    def saved(self, now: Moment) -> None:
        """Put the window beside Trainer's files: even an empty one knows the last step."""
        directory = checkpoint_path(now.args, now.state)
        is_whole_here = not self.reader.is_sharded and now.args.should_save
        if is_whole_here and os.path.isdir(directory):
            save_window(self.reader.window, directory, now.state.global_step, self.file)

    def close(self) -> None:
        """Let go of the optimizer and the window."""
        self.reader.release()

    def _after_step(self, now: Moment, window: WindowRatio | None) -> None:
        """Let the rule decide. `window` is the one that closed with this step."""
        raise NotImplementedError

    def _continue(self, rule_state: dict[str, Any], history: list[dict[str, Any]]) -> None:
        """Go on from what the rule remembered; {} if that is nothing."""
        raise NotImplementedError

    def _look_at_data(self, now: Moment) -> None:
        lengths = (batch_count(now.loader),)
        found = agree_on(data_pass(now.loader), lengths, now.args.device)
        self._data, (self._epoch_batches,) = found

    def _plan(self, now: Moment) -> RunPlan:
        return RunPlan.of(
            self._data,
            window=self._options.window,
            asked=self._options.epoch_steps,
            run_steps=now.state.max_steps,
            epoch_batches=self._epoch_batches,
            accumulation=now.args.gradient_accumulation_steps,
            batch_size=batch_size_of(now.args, now.state),
        )

    def _follow(self, now: Moment) -> None:
        if changes := self.reader.follow(self._plan(now)):
            logger.info("%s: %s; a window starts here.", self._voice.name, ", ".join(changes))


def save_window(window: GradientWindow, directory: str, step: int, name: str = WINDOW_FILE) -> None:
    """Write the unfinished window of a step; a file of this name is either whole or absent."""
    state = window.state_dict()
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    for key in BY_POSITION:
        tensors |= {f"{key}.{i}": t for i, t in state[key].items()}
    metadata = {"accumulator": state["accumulator"], "seen": str(state["seen"]), "step": str(step)}
    with write_whole(os.path.join(directory, name)) as temporary:
        contiguous = {name: t.contiguous() for name, t in tensors.items()}
        save_file(contiguous, str(temporary), metadata=metadata)


def load_window(
    directory: str, step: int, params: Sequence[Tensor], name: str = WINDOW_FILE
) -> dict[str, Any] | None:
    """State for `GradientWindow.load_state_dict`; None if there is none that fits step and shapes.

    A damaged file is a ValueError that names it.
    """

    def window_of(file: Any, metadata: dict[str, str]) -> dict[str, Any] | None:
        state = empty_state(metadata.get("accumulator", ""), int(metadata["seen"]))
        for entry in file.keys():  # noqa: SIM118 (no dict)
            key, _, position = entry.partition(".")
            if position:
                state.setdefault(key, {})[position] = file.get_tensor(entry)
            else:
                state[key] = file.get_tensor(entry)
        return state if window_fits(state, params) else None

    without = "the unfinished window then starts afresh"
    found: dict[str, Any] | None = read_saved(directory, step, name, window_of, without)
    return found

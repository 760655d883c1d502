"""What a run of the stop leaves: numbers in logs, a report, and the weights that are its result."""

import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import fsspec
import torch
from torch import Tensor

from poprisk_integrations.diagnostics.cooldown import KeptWeights
from poprisk_integrations.diagnostics.risk_stop import RiskStop, best_is_lost
from poprisk_integrations.diagnostics.stop_report import STOP_REPORT, report_text, write_report
from poprisk_integrations.lightning._upstream import (
    SHARDED,
    LightningModule,
    Trainer,
    checkpoint_saved_at,
    is_logger_step,
    rank_zero_info,
    rank_zero_warn,
    strategy_is,
    write_line,
)

__all__ = ["RunResult", "StepLog", "leave_report", "load_weights_back", "report_directory"]


class StepLog:
    """Logs values that rarely change, and no decision too late."""

    def __init__(self) -> None:
        self._epoch: int | None = None
        self._values: Mapping[str, float] = {}
        self._names: dict[str, float] = {}  # all that were logged so far, each with NaN

    def write(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        values: Callable[[], Mapping[str, float]],
        *,
        is_new: bool,
        is_decision: bool,
    ) -> None:
        """Log `values()` after an optimizer step at which something was measured or decided."""
        # Lightning's `log` takes a tenth of a millisecond and more per value, as much as a whole
        # window step. It keeps a value for other callbacks from then on, and for loggers until the
        # epoch ends. So it is called when a value is new, and on the steps that Lightning hands to
        # loggers (every `log_every_n_steps`) if the epoch is another or a value has drifted.
        is_due, is_logged_now = is_new or is_decision, is_logger_step(trainer)
        if trainer.barebones or not (is_due or is_logged_now):
            return
        present = values()
        if is_due or self._epoch != trainer.current_epoch or present != self._values:
            self._epoch, self._values = trainer.current_epoch, present
            pl_module.log_dict(self._line(present), on_step=True, on_epoch=False, batch_size=1)
        if is_decision and not is_logged_now:
            self.write_now(trainer, present)

    def write_now(self, trainer: Trainer, values: Mapping[str, float]) -> None:
        """Write one line to every logger, of the step that has just ended."""
        write_line(trainer, self._line(values))

    def _line(self, values: Mapping[str, float]) -> dict[str, float]:
        # What does not exist yet is not logged: no number could stand for it without looking like
        # a measurement. What ceases to exist (an onset that is forgotten) is logged as NaN.
        self._names |= dict.fromkeys(values, math.nan)
        return {**self._names, **values}


class RunResult:
    """What was kept of earlier moments: checkpoints, and copies in memory."""

    def __init__(self, restore: str | None, may_act: bool, owner: str) -> None:
        self._restore = restore
        self._owner = owner
        self._saves_onset = may_act and restore == "onset"
        self._saves_best = False
        self._copy: KeptWeights | None = None
        self._keeps_copy = False  # in a checkpoint, which one process writes
        self._saved_copy: dict[str, Tensor] = {}
        self._onset_path = ""
        self._best_path = ""
        self._stop_path = ""

    @property
    def path(self) -> str:
        """Checkpoint of the result, "" if there is none."""
        paths = {"onset": self._onset_path, "best": self._best_path or self._stop_path}
        return {**paths, "stop": self._stop_path}.get(str(self._restore), "")

    def check_onset(self, trainer: Trainer, onset_step: int | None) -> None:
        """Before training: OSError if the onset's checkpoint is missing or cannot be written."""
        if not self._saves_onset:
            return
        path = self._onset_path
        if onset_step is not None and not (path and _exists(path)):
            raise FileNotFoundError(
                f"Invalid restore: 'onset'. The onset was at step {onset_step}, before this "
                f"resume, and its checkpoint {path!r} does not exist. Put it there, or use "
                "restore='stop'."
            )
        _check_directory(trainer, "onset")

    def check_best(self, trainer: Trainer, pl_module: LightningModule, stop: RiskStop) -> None:
        """Before training: choose how to keep the weights of the best window, if they are wanted.

        On resume `stop` knows a best window that is past.
        """
        if not stop.wants_best:
            return
        is_sharded = strategy_is(trainer, *SHARDED)
        if strategy_is(trainer, "DeepSpeedStrategy"):
            self._without_best(f"{type(trainer.strategy).__name__} holds weights of its own")
        elif stop.action == "cooldown" or is_sharded:
            # It starts from them in mid-run; of shards each process holds its own.
            self._copy, self._keeps_copy = KeptWeights(pl_module), not is_sharded
            self._copy.load_state_dict(self._saved_copy)
            is_lost = self._copy.is_empty and stop.cooldown_step is None
            if is_lost and stop.best_step is not None:
                rank_zero_warn(f"{self._owner}: {best_is_lost(stop.best_step)}.")
        elif self._best_path and not _exists(self._best_path):
            self._without_best(f"the checkpoint {self._best_path} is gone")
        else:
            try:
                _check_directory(trainer, "best")
                self._saves_best = True
            except OSError as error:
                self._without_best(str(error))

    def _without_best(self, why: str) -> None:
        self._best_path = ""
        rank_zero_warn(
            f"{self._owner}: the best weights are not loaded back when fit ends: {why}. Their step "
            "is in best_step; ModelCheckpoint(monitor='poprisk/estimated_test_loss') keeps a "
            "checkpoint of it."
        )

    def after_step(self, trainer: Trainer, onset_step: int | None, *, is_onset: bool) -> None:
        """Save at the onset, forget the path with it. Every rank must call."""
        if is_onset and self._saves_onset and onset_step is not None:
            path = _kept_path(trainer, "onset", onset_step)
            self._onset_path = path  # which the checkpoint holds too
            if not self._save(trainer, path, "onset"):
                self._onset_path = ""
        elif onset_step is None:
            self._onset_path = ""

    def keep_best(self, trainer: Trainer) -> None:
        """Save or copy a new best, and remove the one before. Every rank must call."""
        if self._copy is not None:
            self._copy.keep()
        before, path = self._best_path, _kept_path(trainer, "best", trainer.global_step)
        if not self._saves_best or before == path:
            return
        if self._save(trainer, path, "best window", weights_only=True):
            self._best_path = path
            if before:
                trainer.strategy.remove_checkpoint(before)

    def after_fit(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        onset_step: int | None,
        stopped_step: int | None,
    ) -> None:
        """Load the onset's weights back; note which checkpoint was saved at the stop."""
        if self._saves_onset and self._onset_path:
            self._load(pl_module, self._onset_path, f"of step {onset_step}")
        if stopped_step is not None:
            self._stop_path = checkpoint_saved_at(trainer, stopped_step) or self._stop_path

    def load_best(self, pl_module: LightningModule, best_step: int | None) -> None:
        """Load the best window's weights back."""
        if self._saves_best and self._best_path:
            self._load(pl_module, self._best_path, f"of the best window, step {best_step},")
        elif self._restore == "best" and self.go_back():
            rank_zero_info(
                f"{self._owner}: loaded the weights of the best window, step {best_step}"
            )

    def go_back(self) -> bool:
        """Put the copy of the best window's weights in, in mid-run; whether there is one."""
        return self._copy is not None and self._copy.load()

    def prefer_last(self, trainer: Trainer, *, is_final: bool) -> None:
        """The last weights are the result; `is_final`: even a resumed run needs no others."""
        if self._best_path and is_final:
            trainer.strategy.remove_checkpoint(self._best_path)
        self._best_path = ""

    def _save(self, trainer: Trainer, path: str, what: str, *, weights_only: bool = False) -> bool:
        """Save, or warn if it cannot be written: training matters more."""
        try:
            trainer.save_checkpoint(path, weights_only=weights_only)
        except (OSError, RuntimeError) as error:  # torch's own writer raises the second
            trainer.strategy.barrier()  # at which the other ranks wait, for the first one to write
            rank_zero_warn(
                f"{self._owner}: the checkpoint of the {what} could not be written to {path} "
                f"({error}). Training goes on; in the end the module holds the last weights."
            )
            return False
        return True

    def _load(self, pl_module: LightningModule, path: str, which: str) -> None:
        try:
            load_weights_back(pl_module, path)
        except RuntimeError as error:
            rank_zero_warn(f"{self._owner}: {error}")
            return
        rank_zero_info(f"{self._owner}: loaded the weights {which} back from {path}")

    def state_dict(self) -> dict[str, Any]:
        """The paths and, where it can be, the copy."""
        keeps_copy = self._copy is not None and self._keeps_copy
        return {
            "best_weights": self._copy.state_dict() if keeps_copy and self._copy else {},
            "onset_path": self._onset_path,
            "best_path": self._best_path,
            "stop_path": self._stop_path,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore."""
        self._saved_copy = dict(state_dict.get("best_weights", {}))
        self._onset_path = state_dict["onset_path"]
        self._best_path = state_dict.get("best_path", "")
        self._stop_path = state_dict["stop_path"]


def report_directory(trainer: Trainer) -> str | None:
    """The run's own directory at its logger, else ModelCheckpoint's; asked on the first rank."""
    for logger in trainer.loggers:
        if directory := getattr(logger, "log_dir", None):
            return str(directory)
        # One that many runs share (a tracker's `save_dir`) has a directory for each below it, where
        # ModelCheckpoint puts the run's checkpoints too.
        version = logger.version
        if logger.save_dir and version is not None:
            version = version if isinstance(version, str) else f"version_{version}"
            return os.path.join(logger.save_dir, str(logger.name), version)
    return getattr(trainer.checkpoint_callback, "dirpath", None)


def leave_report(directory: str, report: Mapping[str, Any]) -> None:
    """Write `poprisk_stop.json` into a directory, which may be a URL."""
    if "://" not in directory:
        write_report(directory, report)
        return
    filesystem, _ = fsspec.core.url_to_fs(directory)
    filesystem.makedirs(directory, exist_ok=True)
    path = os.path.join(directory, STOP_REPORT)
    with fsspec.open(path, "w", encoding="utf-8") as file:  # object stores take it whole
        file.write(report_text(report))


def load_weights_back(pl_module: LightningModule, path: str) -> None:
    """Load a checkpoint's weights into the module; RuntimeError if it cannot be read safely."""
    try:
        with fsspec.open(path, "rb") as file:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise RuntimeError(
            f"The weights could not be loaded back from {path} ({error}). The module holds those "
            "of the last step."
        ) from error
    pl_module.on_load_checkpoint(checkpoint)
    pl_module.load_state_dict(checkpoint["state_dict"], strict=pl_module.strict_loading)


def _kept_path(trainer: Trainer, what: str, step: int) -> str:
    """Where to save: ModelCheckpoint's directory if there is one, else `default_root_dir`."""
    directory = getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir
    return os.path.join(str(directory), f"poprisk-{what}-step={step}.ckpt")


def _check_directory(trainer: Trainer, what: str) -> None:
    """Before training: OSError if no checkpoint can be written."""
    directory = os.path.dirname(_kept_path(trainer, what, 0))
    if "://" not in directory:
        os.makedirs(directory, exist_ok=True)
        if not os.access(directory, os.W_OK):
            raise PermissionError(f"Cannot write the {what}'s checkpoint to {directory!r}.")


def _exists(path: str) -> bool:
    """Whether a checkpoint is there."""
    filesystem, place = fsspec.core.url_to_fs(path)
    return bool(filesystem.exists(place))

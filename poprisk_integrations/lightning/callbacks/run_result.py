"""Which weights are a run's result: those of the stop, or of the onset, kept and loaded back."""

from collections.abc import Mapping
from typing import Any

from poprisk_integrations.lightning._upstream import (
    LightningModule,
    Trainer,
    checkpoint_saved_at,
    rank_zero_info,
    rank_zero_warn,
)
from poprisk_integrations.lightning.callbacks.onset_checkpoint import (
    check_onset_checkpoint,
    load_weights_back,
    onset_path,
)

__all__ = ["RunResult"]


class RunResult:
    """Paths of the checkpoints of the onset and of the stop.

    Args:
        restore: "stop", "onset" or None.
        may_stop: Whether the callback acts at all.
        owner: Its name, for messages.
    """

    def __init__(self, restore: str | None, may_stop: bool, owner: str) -> None:
        self._restore = restore
        self._owner = owner
        self._saves_onset = may_stop and restore == "onset"
        self._onset_path = ""
        self._stop_path = ""

    @property
    def path(self) -> str:
        """Checkpoint of the result, "" if there is none."""
        return {"onset": self._onset_path, "stop": self._stop_path}.get(str(self._restore), "")

    def check(self, trainer: Trainer, onset_step: int | None) -> None:
        """Before training: raise if the onset's checkpoint is missing or cannot be written."""
        if self._saves_onset:
            check_onset_checkpoint(trainer, onset_step, self._onset_path)

    def after_step(self, trainer: Trainer, onset_step: int | None, *, is_onset: bool) -> None:
        """Save at the onset, forget the path with it. Every rank must call."""
        if is_onset and self._saves_onset and onset_step is not None:
            self._onset_path = onset_path(trainer, onset_step)  # which the checkpoint holds too
            self._save(trainer, self._onset_path)
        elif onset_step is None:
            self._onset_path = ""

    def after_fit(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        onset_step: int | None,
        stopped_step: int | None,
    ) -> None:
        """Load the onset's weights back; note which checkpoint was saved at the stop."""
        if self._saves_onset and self._onset_path:
            self._load(pl_module, onset_step)
        if stopped_step is not None:
            callbacks = trainer.checkpoint_callbacks
            paths = (checkpoint_saved_at(callback, stopped_step) for callback in callbacks)
            self._stop_path = next(filter(None, paths), self._stop_path)

    def _save(self, trainer: Trainer, path: str) -> None:
        """Save, or warn if it cannot be written: training matters more."""
        try:
            trainer.save_checkpoint(path, weights_only=False)
        except (OSError, RuntimeError) as error:  # torch's own writer raises the second
            trainer.strategy.barrier()  # at which the other ranks wait, for the first one to write
            rank_zero_warn(
                f"{self._owner}: the checkpoint of the onset could not be written to {path} "
                f"({error}). Training goes on; in the end the module holds the last weights."
            )
            self._onset_path = ""

    def _load(self, pl_module: LightningModule, onset_step: int | None) -> None:
        try:
            load_weights_back(pl_module, self._onset_path)
        except RuntimeError as error:
            rank_zero_warn(f"{self._owner}: {error}")
            return
        rank_zero_info(
            f"{self._owner}: loaded the weights of step {onset_step} back from {self._onset_path}"
        )

    def state_dict(self) -> dict[str, str]:
        """The paths."""
        return {"onset_path": self._onset_path, "stop_path": self._stop_path}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the paths."""
        self._onset_path = state_dict["onset_path"]
        self._stop_path = state_dict["stop_path"]

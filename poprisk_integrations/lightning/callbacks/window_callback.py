"""What callbacks that read every optimizer step through a window have in common."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from poprisk_integrations.diagnostics.guard import Guarded, guarded
from poprisk_integrations.lightning._upstream import (
    Callback,
    LightningModule,
    Trainer,
    rank_zero_warn,
)
from poprisk_integrations.lightning.callbacks.resume import resume_feed
from poprisk_integrations.lightning.callbacks.step_feed import NO_FEED, StepFeed

__all__ = ["WindowCallback"]


class WindowCallback(Guarded, Callback):
    """Owns a `StepFeed` while a fit lasts, and its part of the checkpoint.

    Subclasses make it in `on_train_start`, say at `_before_first_batch` what they can do, and do
    their work in `_after_step`. An unexpected error in mid-run switches the callback off.
    """

    _name: str

    def _reset(self) -> None:
        self.switched_off = None
        self._feed: StepFeed | None = None  # None outside of training
        self._is_starting = False  # before the first batch
        self._saved_feed: dict[str, Any] | None = None
        self._setup: dict[str, Any] = {}

    @abstractmethod
    def _before_first_batch(self, trainer: Trainer, feed: StepFeed) -> None:
        """One line about what this callback can do in this run."""

    @abstractmethod
    def _after_step(self, trainer: Trainer, pl_module: LightningModule, feed: StepFeed) -> None:
        """Work after an optimizer step, at the end of its batch."""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin, or continue the checkpoint's window, once per fit.

        Not in `on_train_start`: what other callbacks change before the first batch counts.
        """
        if self._feed is not None and self._is_starting:
            self._is_starting = False
            self._feed.settle(trainer)
            self._resume(trainer, self._feed)
            self._before_first_batch(trainer, self._feed)
            if self._feed.reader.owed_lr is not None:
                self._after_step(trainer, pl_module, self._feed)
        elif self._feed is not None and batch_idx == 0 and trainer.world_size > 1:
            self._feed.follow(trainer)

    @guarded
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count micro-batches. The count is not saved: Lightning drops their gradients too."""
        if self._feed is not None:
            self._feed.count_micro_batch()

    @guarded
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Take in this step's gradients and learning rate."""
        if self._feed is not None:
            self._feed.read(trainer, optimizer)

    @guarded
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Decide after an optimizer step, and log."""
        if self._feed is not None and self._feed.has_stepped(trainer):
            self._after_step(trainer, pl_module, self._feed)

    @guarded
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Let go of the optimizer."""
        self._release()

    @guarded
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the optimizer and of its device's memory."""
        self._release()

    def switch_off(self, where: str, error: Exception) -> None:
        """Let go of the window too."""
        super().switch_off(where, error)
        self._feed = None

    def state_dict(self) -> dict[str, Any]:
        """Numbers, strings, None and tensors: safe for `weights_only` loading."""
        return self._state() or {}

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """What `state_dict` gives; guarded."""

    def _settings(self) -> dict[str, Any]:
        """Settings on which no window depends, but decisions do."""
        return {}

    def _open(self, feed: StepFeed) -> None:
        self._feed, self._is_starting = feed, True

    def _resume(self, trainer: Trainer, feed: StepFeed) -> None:
        """Continue the checkpoint's window, with one warning at most."""
        before, settings = self._setup, self._settings()
        self._setup = {**settings, **feed.setup}
        saved, self._saved_feed = self._saved_feed, None
        warning = None
        if trainer.global_step > 0 and saved is not None:
            warning = resume_feed(feed, saved, before, self._setup, list(settings))
        elif trainer.global_step > 0:
            warning = (
                f"it knows nothing of the steps before {trainer.global_step}; what it counts "
                "starts there."
            )
        if warning is not None:
            rank_zero_warn(f"{self._name}: {warning}")

    def _feed_state(self) -> dict[str, Any]:
        if self._feed is None or self._is_starting:
            return {**NO_FEED, **(self._saved_feed or {}), "setup": dict(self._setup)}
        self._setup.update(self._feed.setup)  # it may have changed since the start
        return {**self._feed.state_dict(), "setup": dict(self._setup)}

    def _load_feed_state(self, state_dict: Mapping[str, Any]) -> None:
        """The window follows when training starts and devices are known."""
        self._saved_feed = {k: state_dict.get(k, none) for k, none in NO_FEED.items()}
        self._setup = dict(state_dict.get("setup", {}))

    def _release(self) -> None:
        if self._feed is None:
            return
        state = self._feed.release()
        if not self._is_starting:
            self._saved_feed = state
            self._setup.update(self._feed.setup)
        self._feed = None

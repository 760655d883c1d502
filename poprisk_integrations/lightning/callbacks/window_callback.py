"""What callbacks that read every optimizer step through a window have in common."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from poprisk_integrations.lightning._upstream import (
    Callback,
    LightningModule,
    Trainer,
    rank_zero_warn,
)
from poprisk_integrations.lightning.callbacks.resume import resume_feed
from poprisk_integrations.lightning.callbacks.step_feed import NO_FEED, StepFeed

__all__ = ["WindowCallback"]


class WindowCallback(Callback):
    """Owns a `StepFeed` from `_open` to the end of the fit, and its part of the checkpoint.

    Subclasses open it in `on_train_start` and do their work in `_after_step`.
    """

    def _reset(self) -> None:
        self._feed: StepFeed | None = None  # None outside of training
        self._saved_feed: dict[str, Any] | None = None
        self._setup: dict[str, Any] = {}

    @abstractmethod
    def _after_step(self, trainer: Trainer, pl_module: LightningModule, feed: StepFeed) -> None:
        """Work after an optimizer step, at the end of its batch."""

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count micro-batches. The count is not saved: Lightning drops their gradients too."""
        if self._feed is not None:
            self._feed.count_micro_batch()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Take in this step's gradients and learning rate."""
        if self._feed is not None:
            self._feed.read(trainer, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Decide after an optimizer step, and log."""
        if self._feed is not None and self._feed.has_stepped(trainer):
            self._after_step(trainer, pl_module, self._feed)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Let go of the optimizer."""
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the optimizer and of its device's memory."""
        self._release()

    def _open(
        self, trainer: Trainer, feed: StepFeed, owner: str, settings: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Start with a new feed, or continue the checkpoint's window, with one warning at most.

        Args:
            trainer: Training.
            feed: New.
            owner: Name of the callback.
            settings: On which no window depends, but decisions do.

        Returns:
            The setup of the run that wrote the checkpoint; empty if there is none.
        """
        self._feed = feed
        before, self._setup = self._setup, {**settings, **feed.setup_of(trainer)}
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
            rank_zero_warn(f"{owner}: {warning}")
        return before

    def _feed_state(self) -> dict[str, Any]:
        feed = self._saved_feed if self._feed is None else self._feed.state_dict()
        return {**(NO_FEED if feed is None else feed), "setup": dict(self._setup)}

    def _load_feed_state(self, state_dict: Mapping[str, Any]) -> None:
        """The window follows when training starts and devices are known."""
        self._saved_feed = {k: state_dict.get(k, none) for k, none in NO_FEED.items()}
        self._setup = dict(state_dict.get("setup", {}))

    def _release(self) -> None:
        if self._feed is not None:
            self._saved_feed = self._feed.release()
            self._feed = None

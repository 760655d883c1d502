"""Cuts the learning rate of a Lightning Trainer without validation data."""

import math
from typing import Any, Literal

from poprisk_integrations.core import LearningRateCutConfig, LearningRateCutRule, WindowRatio
from poprisk_integrations.diagnostics.guard import guarded
from poprisk_integrations.diagnostics.learning_rate_scaling import (
    cut_factor,
    is_undone,
    largest_lr,
    scale_learning_rates,
)
from poprisk_integrations.lightning._upstream import (
    LightningModule,
    Trainer,
    is_fast_dev_run,
    rank_zero_info,
    rank_zero_warn,
)
from poprisk_integrations.lightning.callbacks.arguments import check_window
from poprisk_integrations.lightning.callbacks.refusals import refuse_strategy
from poprisk_integrations.lightning.callbacks.step_feed import StepFeed
from poprisk_integrations.lightning.callbacks.step_log import StepLog
from poprisk_integrations.lightning.callbacks.window_callback import WindowCallback

__all__ = ["PopRiskLRCut"]

_NAME = "PopRiskLRCut"


class PopRiskLRCut(WindowCallback):
    """Multiplies the learning rate by `factor` when steps undo each other.

    Per window, C is the gain of repeating the last step and U the agreement of consecutive
    gradients. C <= 0 < U in `patience` windows in a row says that the learning rate is too high:
    batches agree on a direction, but what one step gains the next one loses
    (`core.LearningRateCutRule`). Memorising looks different (U <= 0), so it cuts nothing there,
    and goes together with PopRiskEarlyStopping, for which a cut slows training time down.

    All parameter groups are cut alike, and every torch scheduler goes on from there with `factor`
    times what it would have given (`diagnostics.learning_rate_scaling`). A scheduler of your own
    does so if it keeps rates in attributes named as torch names them (`base_lrs`, `max_lr`); one
    that computes them from constants undoes the cut, which a warning tells.

    It is decided at the end of windows, from numbers that were reduced over ranks, so all ranks
    cut together. Logs `poprisk/lr_cuts`. The state is in the checkpoint, the learning rates are
    in those of the optimizer and the schedulers: a resumed run equals one that was never
    interrupted.

    Args:
        factor: The learning rates are multiplied by it, in (0, 1).
        patience: Windows in a row that must say so, >= 1.
        window: Optimizer steps per window, >= 4, or "auto" as in PopRiskEarlyStopping.
        max_cuts: No more cuts than this, >= 1.
        min_lr: The largest learning rate is not cut below this, >= 0. The schedule may go lower.

    Raises:
        ValueError: If an argument is outside its range.
        MisconfigurationException: As PopRiskEarlyStopping, when `fit` starts.

    Example:
        >>> PopRiskLRCut(factor=0.5, window=50).cuts
        0
    """

    _name = _NAME

    def __init__(
        self,
        factor: float = 0.3,
        patience: int = 2,
        window: int | Literal["auto"] = "auto",
        max_cuts: int = 3,
        min_lr: float = 0.0,
    ) -> None:
        check_window(window)
        if not 0.0 <= min_lr < math.inf:
            raise ValueError(f"Invalid min_lr: {min_lr}. Must be finite and >= 0.")
        self._config = LearningRateCutConfig(factor=factor, patience=patience, max_cuts=max_cuts)
        self.window = window
        self.min_lr = min_lr
        self._reset()

    def _reset(self) -> None:
        super()._reset()
        self._rule = LearningRateCutRule(self._config)
        self._last_cut: tuple[float, float] | None = None  # rates, until they change again
        self._has_warned = False
        self._log = StepLog()

    @property
    def state_key(self) -> str:
        """Callbacks with different arguments keep states apart."""
        c = self._config
        return f"{_NAME}{(c.factor, c.patience, self.window, c.max_cuts, self.min_lr)!r}"

    @property
    def cuts(self) -> int:
        """How often the learning rate was cut."""
        return self._rule.state.cuts

    @property
    def last_cut_step(self) -> int | None:
        """Optimizer step of the last cut; None if there is none."""
        return self._rule.state.last_cut_step

    def metrics(self) -> dict[str, float]:
        """The present values of all that this callback logs."""
        return {"poprisk/lr_cuts": float(self.cuts)}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, and start afresh: a checkpoint is loaded after this."""
        if stage == "fit":
            self._reset()
            refuse_strategy(trainer, _NAME)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the window, or continue the checkpoint's."""
        if is_fast_dev_run(trainer):
            return
        # C and U are measured on the sampled coordinates in any case.
        feed = StepFeed(trainer, pl_module, owner=_NAME, window=self.window, accumulator="sample")
        self._open(feed)

    def _before_first_batch(self, trainer: Trainer, feed: StepFeed) -> None:
        first = feed.step + self._config.patience * feed.plan.window
        rank_zero_info(
            f"{_NAME}: looks every {feed.plan.window} steps whether the learning rate is too high; "
            f"the first cut can come at step {first}"
        )

    def _after_step(self, trainer: Trainer, pl_module: LightningModule, feed: StepFeed) -> None:
        feed.take_lr()
        self._look_back(feed.reader.lr)
        is_cut = False
        if feed.is_full:
            closed = feed.close()
            factor = cut_factor(trainer.optimizers, self._config.factor, self.min_lr)
            is_cut = closed is not None and factor < 1.0 and self._is_due(feed.step, closed)
        if is_cut:
            schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
            before = max(map(largest_lr, trainer.optimizers))
            scale_learning_rates(trainer.optimizers, schedulers, factor)
            self._last_cut = before, factor * before
            rank_zero_info(f"{_NAME}: {self._rule.state.reason}")
        self._log.write(
            trainer, pl_module, feed.step, self.metrics, is_new=is_cut, is_decision=is_cut
        )

    @guarded
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what was done."""
        if self._feed is not None:
            times = "once" if self.cuts == 1 else f"{self.cuts} times"
            did = f"cut the learning rate {times}" if self.cuts else "saw no reason for a cut"
            rank_zero_info(f"{_NAME}: {did}")

    @guarded
    def _state(self) -> dict[str, Any]:
        return {"rule": self._rule.state_dict(), **self._feed_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore; the window follows when training starts and devices are known."""
        self._rule.load_state_dict(state_dict["rule"])
        self._load_feed_state(state_dict)

    def _look_back(self, lr: float) -> None:
        """Warn once if the rate of a step shows that the schedule undid the cut before it."""
        if self._last_cut is None or math.isclose(lr, self._last_cut[1]):
            return
        (before, after), self._last_cut = self._last_cut, None
        if is_undone(before, after, lr) and not self._has_warned:
            self._has_warned = True
            rank_zero_warn(
                f"{_NAME}: the learning rate was cut from {before:.3g} to {after:.3g} and is "
                f"{lr:.3g} again: the scheduler overwrites it. Let it start from base_lrs, or keep "
                "its rates in attributes whose names end in _lr."
            )

    def _is_due(self, step: int, closed: WindowRatio) -> bool:
        return self._rule.update(
            step=step,
            risk_decrease=closed.risk_decrease,
            risk_decrease_se=closed.risk_decrease_se,
            agreement=closed.agreement,
            agreement_se=closed.agreement_se,
        )

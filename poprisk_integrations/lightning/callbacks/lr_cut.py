"""Cuts the learning rate of a Lightning Trainer without validation data."""

from typing import Any, Literal

from poprisk_integrations.core import LearningRateCutConfig
from poprisk_integrations.diagnostics.gradient_reader import GradientReader
from poprisk_integrations.diagnostics.guard import guarded
from poprisk_integrations.diagnostics.stop_judge import RateCut
from poprisk_integrations.diagnostics.stop_options import check_epoch_steps, check_window
from poprisk_integrations.lightning._upstream import (
    LightningModule,
    Trainer,
    rank_zero_info,
    refuse_strategy,
)
from poprisk_integrations.lightning.callbacks.run_result import StepLog
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
        epoch_steps: Optimizer steps of one pass over the data, for the length of windows where the
            loader does not show it; None for what it shows.

    Raises:
        ValueError: If an argument is outside its range.
        MisconfigurationException: As PopRiskEarlyStopping, when `fit` starts.

    Example:
        >>> PopRiskLRCut(factor=0.5, window=50).cuts
        0
    """

    _name = _NAME
    accumulator = "sample"  # C and U are measured on the sampled coordinates in any case

    def __init__(
        self,
        factor: float = 0.3,
        patience: int = 2,
        window: int | Literal["auto"] = "auto",
        max_cuts: int = 3,
        min_lr: float = 0.0,
        *,
        epoch_steps: int | None = None,
    ) -> None:
        check_window(window)
        check_epoch_steps(epoch_steps)
        self._config = LearningRateCutConfig(factor=factor, patience=patience, max_cuts=max_cuts)
        self.window = window
        self.min_lr = min_lr
        self.epoch_steps = epoch_steps
        self._reset()

    def _reset(self) -> None:
        super()._reset()
        self._cut = RateCut(self._config, self.min_lr)
        self._log = StepLog()

    @property
    def state_key(self) -> str:
        """Callbacks with different arguments keep states apart."""
        c = self._config
        arguments = (c.factor, c.patience, self.window, c.max_cuts, self.min_lr, self.epoch_steps)
        return f"{_NAME}{arguments!r}"

    @property
    def cuts(self) -> int:
        """How often the learning rate was cut."""
        return self._cut.rule.state.cuts

    @property
    def last_cut_step(self) -> int | None:
        """Optimizer step of the last cut; None if there is none."""
        return self._cut.rule.state.last_cut_step

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
        self._begin(trainer, pl_module)

    def _before_first_batch(self, trainer: Trainer, reader: GradientReader) -> None:
        first = self._step + self._config.patience * reader.plan.window
        rank_zero_info(
            f"{_NAME}: looks every {reader.plan.window} steps whether the learning rate is too "
            f"high; the first cut can come at step {first}"
        )

    def _after_step(
        self, trainer: Trainer, pl_module: LightningModule, reader: GradientReader
    ) -> None:
        reader.take_lr()
        closed = reader.close(self._step) if reader.window.is_full else None
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        warning, is_cut = self._cut.after_step(
            self._step, reader.lr, closed, trainer.optimizers, schedulers
        )
        if warning:
            self._warn(warning)
        if is_cut:
            rank_zero_info(f"{_NAME}: {self._cut.rule.state.reason}")
        self._log.write(trainer, pl_module, self.metrics, is_new=is_cut, is_decision=is_cut)

    @guarded
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what was done."""
        if self._reader is not None:
            times = "once" if self.cuts == 1 else f"{self.cuts} times"
            did = f"cut the learning rate {times}" if self.cuts else "saw no reason for a cut"
            rank_zero_info(f"{_NAME}: {did}")

    def state_dict(self) -> dict[str, Any]:
        """Numbers, strings, None and tensors: safe for `weights_only` loading."""
        return self._state() or {}

    @guarded
    def _state(self) -> dict[str, Any]:
        return {"rule": self._cut.rule.state_dict(), **self._reader_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore; the window follows when training starts and devices are known."""
        self._cut.rule.load_state_dict(state_dict["rule"])
        self._load_reader_state(state_dict)

"""Cuts Trainer's learning rate without validation data."""

import math
import sys
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerControl, TrainerState, TrainingArguments

from poprisk_integrations.core import LearningRateCutConfig, LearningRateCutRule
from poprisk_integrations.core.window import WindowRatio
from poprisk_integrations.diagnostics.learning_rate_scaling import cut_factor, scale_learning_rates
from poprisk_integrations.huggingface.callbacks.window_callback import WindowCallback
from poprisk_integrations.huggingface.log_metrics import log_now

__all__ = ["PopRiskLRCut", "PopRiskLRCutCallback"]


class PopRiskLRCutCallback(WindowCallback):
    """Multiplies the learning rate by `factor` when steps gain nothing although batches agree.

    `core.LearningRateCutRule` decides from two numbers of each window of optimizer steps: what
    repeating the last step would gain (C), and whether gradients of consecutive batches point the
    same way (U). C <= 0 < U says that steps overshoot. It is no cut where both are small, which is
    memorising or the end of the signal: there `PopRiskEarlyStoppingCallback` may stop the run.
    Off unless added. Beside the stop it measures a window of its own; F rises after a cut, and
    the stop then forgets an onset that was one of overshooting only.

    The scheduler keeps the cut, for every learning rate that it holds is multiplied too
    (`diagnostics.learning_rate_scaling`). ReduceLROnPlateau and GreedyLR go on from the cut value.
    A resumed run continues with the cuts that were made.

    Logs `poprisk/lr_cuts`; a cut gets a log line of its own, and one on stderr.

    Args:
        factor: In (0, 1).
        patience: Such windows in a row before a cut, >= 1.
        window: Optimizer steps per window, >= 4, or "auto" as for the stop.
        max_cuts: No more cuts than this, >= 1.
        min_lr: The largest learning rate is not cut below this, >= 0; the schedule may go lower.
        accumulator: "auto", "exact" or "sample", see `diagnostics.GradientWindow`.
        epoch_steps: Optimizer steps of one pass over the data; None for what the loader shows.

    Raises:
        ValueError: If an argument is outside its range; at the start of training if it runs under
            DeepSpeed without an Adam's state.

    Example:
        >>> PopRiskLRCut(factor=0.5).state()["args"]["factor"]
        0.5
    """

    _acts = "cut the learning rate"
    _window_name = "poprisk_lr_cut_window"

    def __init__(
        self,
        factor: float = 0.3,
        patience: int = 2,
        window: int | str = "auto",
        max_cuts: int = 3,
        min_lr: float = 0.0,
        *,
        accumulator: str = "auto",
        epoch_steps: int | None = None,
    ) -> None:
        if not (math.isfinite(min_lr) and min_lr >= 0):
            raise ValueError(f"Invalid min_lr: {min_lr!r}. Must be finite and >= 0.")
        self.factor = factor
        self.patience = patience
        self.max_cuts = max_cuts
        self.min_lr = min_lr
        config = LearningRateCutConfig(factor=factor, patience=patience, max_cuts=max_cuts)
        self._rule = LearningRateCutRule(config)
        super().__init__(window, accumulator, epoch_steps)

    def state(self) -> dict[str, Any]:
        """Arguments and numbers for `trainer_state.json`."""
        names = ("factor", "patience", "window", "max_cuts", "min_lr")
        return self._state(*names, "accumulator", "epoch_steps")

    def metrics(self) -> dict[str, float]:
        """How often the learning rate was cut."""
        return {"poprisk/lr_cuts": self._rule.state.cuts}

    def _after_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        window: WindowRatio | None,
        kwargs: dict[str, Any],
    ) -> None:
        optimizer = kwargs["optimizer"]
        if window is None:
            return
        factor = cut_factor([optimizer], self.factor, self.min_lr)
        if factor == 1.0:
            return
        is_cut = self._rule.update(
            step=state.global_step,
            risk_decrease=window.risk_decrease,
            risk_decrease_se=window.risk_decrease_se,
            agreement=window.agreement,
            agreement_se=window.agreement_se,
        )
        if not is_cut:
            return
        scale_learning_rates([optimizer], [kwargs.get("lr_scheduler")], factor)
        log_now(args, control)
        if state.is_world_process_zero:
            tqdm.write(f"poprisk: {self._rule.state.reason}", file=sys.stderr)


PopRiskLRCut = PopRiskLRCutCallback

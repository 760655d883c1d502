"""Cuts Trainer's learning rate without validation data."""

from dataclasses import dataclass, field, fields
from typing import Any

from poprisk_integrations.core import LearningRateCutConfig
from poprisk_integrations.core.window import WindowRatio
from poprisk_integrations.diagnostics.stop_judge import RateCut
from poprisk_integrations.diagnostics.stop_options import check_epoch_steps, check_window
from poprisk_integrations.huggingface.callbacks.windows import Windows
from poprisk_integrations.huggingface.run_callback import ResumableCallback, log_now
from poprisk_integrations.huggingface.run_facts import Moment

__all__ = ["PopRiskLRCut", "PopRiskLRCutCallback"]


@dataclass(eq=False, repr=False)
class PopRiskLRCutCallback(ResumableCallback):
    """Multiplies the learning rate by `factor` when steps gain nothing although batches agree.

    `core.LearningRateCutRule` decides from two numbers of each window of optimizer steps: what
    repeating the last step would gain (C), and whether gradients of consecutive batches point the
    same way (U). C <= 0 < U says that steps overshoot. It is no cut where both are small, which is
    memorising or the end of the signal: there `PopRiskEarlyStoppingCallback` may stop the run.
    Off unless added. Beside the stop it measures a window of its own; F rises after a cut, and
    the stop then forgets an onset that was one of overshooting only.

    The scheduler keeps the cut, for every learning rate that it holds is multiplied too
    (`diagnostics.learning_rate_scaling`). ReduceLROnPlateau and GreedyLR go on from the cut value.
    A scheduler that computes its rates from constants undoes the cut, which a warning tells.
    A resumed run continues with the cuts that were made.

    Logs `poprisk/lr_cuts`; a cut gets a log line of its own, and one on stderr.

    Args:
        factor: In (0, 1).
        patience: Such windows in a row before a cut, >= 1.
        window: Optimizer steps per window, >= 4, or "auto" as for the stop.
        max_cuts: No more cuts than this, >= 1.
        min_lr: The largest learning rate is not cut below this, >= 0; the schedule may go lower.
        epoch_steps: Optimizer steps of one pass over the data, for the length of windows where the
            loader does not show it; None for what it shows.

    Raises:
        ValueError: If an argument is outside its range; at the start of training if it runs under
            DeepSpeed without an Adam's state.

    Example:
        >>> PopRiskLRCut(factor=0.5).state()["args"]["factor"]
        0.5
    """

    accumulator = "sample"  # C and U are measured on the sampled coordinates in any case

    factor: float = 0.3
    patience: int = 2
    window: int | str = "auto"
    max_cuts: int = 3
    min_lr: float = 0.0
    epoch_steps: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_window(self.window)
        check_epoch_steps(self.epoch_steps)
        self._new_cut()  # what is out of range is an error now
        self._begin_afresh()

    def _new_cut(self) -> RateCut:
        config = LearningRateCutConfig(
            factor=self.factor, patience=self.patience, max_cuts=self.max_cuts
        )
        return RateCut(config, self.min_lr)

    def _arguments(self) -> dict[str, Any]:
        return {argument.name: getattr(self, argument.name) for argument in fields(self)}

    def _join(self, now: Moment, *, is_late: bool) -> None:
        self._part = _CutWindows(self, now, self._voice)
        self._part.cut = self._new_cut()
        run, window = now.state.max_steps, self._part.reader.plan.window
        if run < 2 * window:
            self._voice.warn(
                f"the run has {run} steps, fewer than two windows of {window}: it can never cut "
                "the learning rate. Set a smaller window."
            )


class _CutWindows(Windows):
    """Asks the rule at the end of each window, and cuts."""

    cut: RateCut
    _stem = "poprisk_lr_cut_window"

    @property
    def rule_state(self) -> dict[str, Any]:
        return self.cut.rule.state_dict()

    def metrics(self) -> dict[str, float]:
        return {"poprisk/lr_cuts": self.cut.rule.state.cuts}

    def _continue(self, rule_state: dict[str, Any], history: list[dict[str, Any]]) -> None:
        if rule_state:
            self.cut.rule.load_state_dict(rule_state)

    def _after_step(self, now: Moment, window: WindowRatio | None) -> None:
        warning, is_cut = self.cut.after_step(
            now.state.global_step, self.reader.lr, window, [now.optimizer], [now.scheduler]
        )
        if warning:
            self._voice.warn(warning)
        if is_cut:
            log_now(now)
            self._voice.say(str(self.cut.rule.state.reason))


PopRiskLRCut = PopRiskLRCutCallback

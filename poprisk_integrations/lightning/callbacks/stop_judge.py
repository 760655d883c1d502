"""The stopping rule within a training run: windows in, a verdict that may have to wait out."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from poprisk_integrations.core import (
    StoppingConfig,
    StoppingDecision,
    StoppingRule,
    StoppingState,
    WindowRatio,
    diagnose,
)
from poprisk_integrations.diagnostics.window_history import history_row
from poprisk_integrations.lightning._upstream import Trainer, rank_zero_warn
from poprisk_integrations.lightning.callbacks.step_feed import StepFeed, over_ranks
from poprisk_integrations.lightning.callbacks.stop_report import logged_values

__all__ = ["StopJudge"]


class StopJudge:
    """Feeds `StoppingRule` with steps, and keeps what every window said.

    The rule never takes a verdict back, but a trainer that has to reach `min_epochs` first may
    see the signal return: until `accept` is called, a verdict is judged anew at every step.

    Args:
        config: Of the rule.
        owner: Name of the callback, for warnings.

    Attributes:
        history: One record per window, see `diagnostics.window_history.history_row`.
        diagnosis: What the windows say.
    """

    def __init__(self, config: StoppingConfig, owner: str) -> None:
        self._rule = StoppingRule(config)
        self._owner = owner
        self._verdict: StoppingState | None = None  # due, but not accepted
        self._warned = False
        self.diagnosis = ""
        self.history: list[dict[str, Any]] = []

    @property
    def state(self) -> StoppingState:
        """What the rule remembers."""
        return self._rule.state

    @property
    def reason(self) -> str:
        """The last change of mind, and what the windows say."""
        return "; ".join(filter(None, (self.state.reason, self.diagnosis)))

    def metrics(self, step: int, lr: float) -> dict[str, float]:
        """The present values of all that is logged.

        Args:
            step: Optimizer steps so far.
            lr: Present speed of training time.
        """
        predicted = self._rule.predicted_stop_step(step, lr)
        last = self.history[-1] if self.history else {}
        return logged_values(last, self.state.onset_step, predicted)

    def after_step(self, trainer: Trainer, feed: StepFeed) -> StoppingDecision:
        """Account for an optimizer step, and for the window if it ended. Every rank must call."""
        lr, closed = feed.take_lr(), None
        if feed.is_full:
            closed = feed.close()
            self._warn_of_empty_window(feed.step, closed)
            # A scheduler fed with numbers of one rank only would let training times drift apart.
            lr_sum = over_ranks(trainer, self.state.lr_sum)
            self._rule.state = replace(self.state, lr_sum=lr_sum)
            lr = over_ranks(trainer, lr)
        elif self.state.onset_step is not None:
            lr = over_ranks(trainer, lr)  # any step may be the last
        before = self.state
        decision = self._update(feed, lr, closed)
        self._verdict = None
        if decision.stop and before.stop_step is None:
            self._verdict = self.state
            self._rule.state = replace(self.state, stop_step=None, reason=before.reason)
        return decision

    def accept(self) -> bool:
        """Make a verdict final; whether there was one."""
        if self._verdict is None:
            return False
        self._rule.state, self._verdict = self._verdict, None
        return True

    def judge_anew(self, kappa_before: float | None = None) -> None:
        """Forget a stop, but not the onset.

        Args:
            kappa_before: Of the run that saw the onset; None for the present one.
        """
        kappa = self.state.onset_kappa
        if kappa is not None and kappa_before is not None:
            kappa *= self._rule.config.kappa / kappa_before
        self._rule.state = replace(self.state, stop_step=None, onset_kappa=kappa)

    def state_dict(self) -> dict[str, Any]:
        """Numbers, strings and None."""
        return {
            "rule": self._rule.state_dict(),
            "history": [dict(record) for record in self.history],
            "diagnosis": self.diagnosis,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore; an older state may have no history."""
        self._rule.load_state_dict(state_dict["rule"])
        self.history = [dict(record) for record in state_dict.get("history", ())]
        self.diagnosis = state_dict.get("diagnosis", "")

    def _update(self, feed: StepFeed, lr: float, closed: WindowRatio | None) -> StoppingDecision:
        if closed is None:
            return self._rule.update(step=feed.step, lr=lr)
        decision = self._rule.update(
            step=feed.step,
            lr=lr,
            ratio=closed.ratio,
            ratio_se=closed.ratio_se,
            noise=float(closed.noise.sum()),
            reused=feed.reused,
        )
        row = history_row(feed.step, self.state.lr_sum, closed, reused=feed.reused)
        self.history.append(row)
        since, threshold = self.state.onset_step, self._rule.config.threshold
        self.diagnosis = str(diagnose(self.history, since=since, threshold=threshold))
        return decision

    def _warn_of_empty_window(self, step: int, closed: WindowRatio | None) -> None:
        if (closed is None or math.isnan(closed.ratio)) and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"{self._owner}: the window that ended at step {step} had fewer than four steps "
                "with finite, varying gradients and does not count."
            )

"""When to stop at the minimum of the estimated test loss, and which weights to keep."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from poprisk_integrations.core._plain import check_settings, known_fields, number
from poprisk_integrations.core.risk_curve import RECENT

__all__ = [
    "RiskDecision",
    "RiskStopping",
    "RiskStoppingConfig",
    "RiskStoppingState",
    "SchedulePlace",
]

_SERIES = ("excesses", "falls")
_ACCURACIES = ("estimated_test_accuracy", "estimated_test_reward_accuracy")
_SHORTEST = 3  # windows of patience in a short run
_SURE = 100.0  # standard errors, where there is no noise at all (and JSON has no infinity)


class SchedulePlace(Protocol):
    """What the rule asks of a schedule (`diagnostics.SchedulePoint`)."""

    @property
    def rising(self) -> bool:
        """Whether the largest rate of the run is still to come."""

    @property
    def still_decays(self) -> bool:
        """Whether the rate is still to fall by much."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RiskStoppingConfig:
    """Settings of the rule.

    Attributes:
        patience: Windows without a new minimum before a stop, >= 1; half of those of a short run
            are enough, but not fewer than three.
        confidence: Evidence (see `RiskStopping`) from which on the best weights are preferred to
            the last ones at the end of a run, in standard errors, >= 0. An accuracy that has
            risen by half as many of its own since the minimum holds that back, and a stop.
        min_steps: No stop before this many optimizer steps, >= 0.
        tail: Length of a cooldown, as a share of the steps up to the best window, > 0.

    Raises:
        ValueError: If a value is outside its range.
    """

    patience: int = 10
    confidence: float = 1.0
    min_steps: int = 0
    tail: float = 0.5

    def __post_init__(self) -> None:
        check_settings(
            self,
            patience=(self.patience >= 1, ">= 1"),
            confidence=(self.confidence >= 0.0, ">= 0"),
            min_steps=(self.min_steps >= 0, ">= 0"),
            tail=(self.tail > 0.0, "> 0"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RiskStoppingState:
    """Everything the rule remembers: plain numbers, ready for JSON."""

    windows: int = 0  # with an estimate
    # the window with the smallest estimate: optimizer step at its end, number counted from 1
    best_step: int | None = None
    best_window: int = 0
    best: float | None = None
    best_se: float = 0.0
    last: float | None = None  # estimate of the last window
    change_variance: float = 0.0  # of the change from the best window to the last one
    excesses: tuple[float, ...] = ()  # standard errors by which the last windows lie above it
    # the same of the estimated accuracy, where there is one: by how much it lies below
    best_accuracy: float | None = None
    best_accuracy_se: float = 0.0
    accuracy_change_variance: float = 0.0
    falls: tuple[float, ...] = ()
    has_annealed: bool = False  # the schedule was still to decay at some window
    stop_step: int | None = None  # final once set
    reason: str = "no window is complete yet"  # about the last change of mind

    @property
    def evidence(self) -> float:
        """Mean excess of the last windows; 0 where there is only one, right after the minimum."""
        return 0.0 if len(self.excesses) < 2 and self.windows > 2 else _mean(self.excesses)

    def is_overfitting(self, confidence: float) -> bool:
        """Whether the loss says so, and no accuracy the opposite."""
        return self.evidence >= confidence and not self.has_risen(confidence)

    def has_risen(self, confidence: float) -> bool:
        """Whether the accuracy is better than in the best window."""
        return _mean(self.falls) < -confidence / 2


@dataclass(frozen=True, kw_only=True, slots=True)
class RiskDecision:
    """What to do after a window.

    Attributes:
        stop: Whether the run should end now, or cool down where that was asked for.
        is_best: Whether this window has the smallest estimate so far: time to keep a checkpoint.
        cooldown_steps: Length of a cooldown from the best weights, in optimizer steps.
        reason: One line that says why, with numbers.
    """

    stop: bool
    is_best: bool
    cooldown_steps: int
    reason: str


class RiskStopping:
    """Stop when the estimated test loss R has been above its minimum for `patience` windows.

        excess    (R_t - R_best) / se of the change, from the same examples at both times;
                  se^2 = min(sum of change_se^2 since the best window, se_t^2 + se_best^2)
        evidence  mean excess of the last five windows since the best one, of two at least
        best      the smallest R + se / 2, so that no window becomes the best one by its noise
        stop      `patience` windows after the best one, unless an estimated accuracy has risen
                  meanwhile: then the growing loss only says that the model has become too sure of
                  itself
        keep      at the end of a run, the best window, with evidence >= `confidence` (twice that
                  after an annealing schedule, which lowers the loss by itself) and under the same
                  condition

    Never while the learning rate still rises, and not under a schedule that is still to decay:
    annealing often takes R below every earlier value. Such a run is finished, and `keeps_best`
    says then whether an earlier window was better.

    Feed it the same numbers on every rank: it knows no ranks.

    Args:
        config: Settings.
        epoch_steps: Optimizer steps of one pass over the data, the least length of a cooldown.
        windows: Of the whole run; None if unknown.

    Example:
        >>> rule = RiskStopping(RiskStoppingConfig(patience=2))
        >>> for step, value in enumerate([2.0, 1.0, 1.2, 1.4], start=1):
        ...     row = {"step": step, "estimated_test_loss": value,
        ...            "estimated_test_loss_se": 0.1, "estimated_test_loss_change_se": 0.05}
        ...     decision = rule.update(row)
        >>> decision.stop, rule.state.best_step
        (True, 2)
    """

    def __init__(
        self,
        config: RiskStoppingConfig | None = None,
        *,
        epoch_steps: int | None = None,
        windows: int | None = None,
    ) -> None:
        self.config = config if config is not None else RiskStoppingConfig()
        self.epoch_steps = epoch_steps
        self.patience = self.config.patience
        if windows is not None:
            self.patience = min(self.patience, max(_SHORTEST, -(-windows // 2)))
        self.state = RiskStoppingState()

    @property
    def best_step(self) -> int | None:
        """Optimizer step at the end of the best window; None before the first."""
        return self.state.best_step

    @property
    def reason(self) -> str:
        """The last change of mind."""
        return self.state.reason

    def update(
        self, row: Mapping[str, Any], *, schedule: SchedulePlace | None = None
    ) -> RiskDecision:
        """Account for a window.

        Args:
            row: With "step", "estimated_test_loss" and its "_se" and "_change_se"; a window
                without an estimate changes nothing.
            schedule: Where the learning rate is on its way; None for a constant one.

        Returns:
            The decision. Once `stop` is True it stays so.
        """
        step, value = int(row["step"]), number(row, "estimated_test_loss")
        is_best = False
        if value is not None:
            self.state = _after_window(self.state, step, value, row)
            is_best = self.state.best_step == step
            self.state = _with_accuracy(self.state, row, is_best=is_best)
        if schedule is not None and schedule.still_decays:
            self.state = replace(self.state, has_annealed=True)
        if self.state.stop_step is None and self._is_due(step, schedule):
            self.state = replace(self.state, stop_step=step, reason=_reason(self.state, step))
        tail = max(
            round(self.config.tail * (self.state.best_step or step)), self.epoch_steps or 0, 1
        )
        return RiskDecision(
            stop=self.state.stop_step is not None,
            is_best=is_best,
            cooldown_steps=tail,
            reason=self.state.reason,
        )

    def keeps_best(self) -> bool:
        """Whether the weights of the best window are to be preferred to those of the end."""
        state = self.state
        if state.best is None or state.last is None or state.best_window == state.windows:
            return False
        confidence = self.config.confidence * (2 if state.has_annealed else 1)
        return state.last > state.best and state.is_overfitting(confidence)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and None: safe for JSON and `weights_only` loading."""
        lists = {name: list(getattr(self.state, name)) for name in _SERIES}
        return {**asdict(self.state), **lists}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a state; keys that an older version did not write keep their defaults."""
        values = known_fields(RiskStoppingState, state_dict)
        values |= {name: tuple(values.get(name, ())) for name in _SERIES}
        self.state = RiskStoppingState(**values)

    def _is_due(self, step: int, schedule: SchedulePlace | None) -> bool:
        state = self.state
        if step < self.config.min_steps or state.windows - state.best_window < self.patience:
            return False
        if schedule is not None and (schedule.rising or schedule.still_decays):
            return False
        return not state.has_risen(self.config.confidence)


def _after_window(
    before: RiskStoppingState, step: int, value: float, row: Mapping[str, Any]
) -> RiskStoppingState:
    windows = before.windows + 1
    se = number(row, "estimated_test_loss_se") or 0.0
    change_se = number(row, "estimated_test_loss_change_se") or 0.0
    if before.best is None or value + se / 2 < before.best + before.best_se / 2:
        return replace(
            before,
            windows=windows,
            best_step=step,
            best_window=windows,
            best=value,
            best_se=se,
            last=value,
            change_variance=0.0,
            excesses=(),
            reason=f"the estimated test loss was lowest at step {step} ({value:.4g} +- {se:.2g})",
        )
    variance = before.change_variance + change_se**2
    excess = _in_errors(value - before.best, min(variance, se**2 + before.best_se**2))
    return replace(
        before,
        windows=windows,
        last=value,
        change_variance=variance,
        excesses=(*before.excesses, excess)[-RECENT:],
    )


def _with_accuracy(
    state: RiskStoppingState, row: Mapping[str, Any], *, is_best: bool
) -> RiskStoppingState:
    name = next((name for name in _ACCURACIES if row.get(name) is not None), "")
    if not name:
        return state
    value, se = float(row[name]), number(row, f"{name}_se") or 0.0
    if is_best or state.best_accuracy is None:
        return replace(
            state,
            best_accuracy=value,
            best_accuracy_se=se,
            accuracy_change_variance=0.0,
            falls=(),
        )
    variance = state.accuracy_change_variance + (number(row, f"{name}_change_se") or 0.0) ** 2
    fall = _in_errors(state.best_accuracy - value, min(variance, se**2 + state.best_accuracy_se**2))
    return replace(state, accuracy_change_variance=variance, falls=(*state.falls, fall)[-RECENT:])


def _in_errors(difference: float, variance: float) -> float:
    if variance > 0:
        return difference / math.sqrt(variance)
    return math.copysign(_SURE, difference) if difference else 0.0


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / max(1, len(values))


def _reason(state: RiskStoppingState, step: int) -> str:
    return (
        f"at step {step}: the estimated test loss was lowest at step {state.best_step} "
        f"({state.best:.4g} +- {state.best_se:.2g}), "
        f"{state.windows - state.best_window} windows ago, and is {state.last:.4g} now"
    )

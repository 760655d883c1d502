"""When to stop without validation data: arm, onset, stop at a multiple of the onset."""

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

__all__ = ["StoppingConfig", "StoppingDecision", "StoppingRule", "StoppingState"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoppingConfig:
    """Settings of the rule.

    Args:
        kappa: Stop at this multiple of the onset time, >= 1. On reused data the criterion
            crosses at half the best time (quadratic loss, gradient flow), hence 2.
        threshold: F below this is the onset, > 0.
        arm_threshold: F must exceed this once before an onset counts, >= threshold. A run that
            starts at pure noise has learned nothing that it could forget. Fine-tuning of language
            models starts little above 1 (1.1 with windows of one epoch in `poprisk demo`), so the
            bar is low.
        rearm_threshold: F above this after the onset ...
        rearm_windows: ... for this many consecutive windows forgets the onset.
        min_steps: No stop before this many optimizer steps.

    Raises:
        ValueError: If a value is outside its range.
    """

    kappa: float = 2.0
    threshold: float = 1.0
    arm_threshold: float = 1.05
    rearm_threshold: float = 1.3
    rearm_windows: int = 2
    min_steps: int = 0

    def __post_init__(self) -> None:
        checks = (
            ("kappa", self.kappa >= 1.0, ">= 1"),
            ("threshold", self.threshold > 0.0, "> 0"),
            ("arm_threshold", self.arm_threshold >= self.threshold, ">= threshold"),
            ("rearm_threshold", self.rearm_threshold >= self.threshold, ">= threshold"),
            ("rearm_windows", self.rearm_windows >= 1, ">= 1"),
            ("min_steps", self.min_steps >= 0, ">= 0"),
        )
        for name, ok, allowed in checks:
            value = getattr(self, name)
            if not ok or not math.isfinite(value):
                raise ValueError(f"Invalid {name}: {value}. Must be finite and {allowed}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class StoppingState:
    """Everything the rule remembers: plain numbers, ready for JSON.

    Attributes:
        lr_sum: Training time so far, the sum of the learning rates of all optimizer steps.
        windows: Windows seen.
        armed: Whether F has exceeded the arm threshold.
        signal_ratio: F of the last window.
        onset_step: Optimizer step at which F first fell below the threshold.
        onset_lr_sum: `lr_sum` at that step.
        onset_ratio: F at that step.
        windows_above: Consecutive windows above the re-arm threshold since the onset.
        stop_step: Optimizer step of the stop; final once set.
        reason: One line about the last change of mind.
    """

    lr_sum: float = 0.0
    windows: int = 0
    armed: bool = False
    signal_ratio: float | None = None
    onset_step: int | None = None
    onset_lr_sum: float | None = None
    onset_ratio: float | None = None
    windows_above: int = 0
    stop_step: int | None = None
    reason: str = "no window is complete yet"


@dataclass(frozen=True, kw_only=True, slots=True)
class StoppingDecision:
    """What to do after a step.

    Attributes:
        stop: Whether the run should end now.
        onset: Whether the onset happened at this very step (time to keep a checkpoint).
        reason: One line that says why, with numbers.
    """

    stop: bool
    onset: bool
    reason: str


class StoppingRule:
    """Stop at `kappa` times the moment when training gradients stopped carrying signal.

        armed    once F > arm_threshold
        onset    first window with F < threshold, at training time tau_0 = sum of lr
        stop     first step with tau >= kappa * tau_0
        re-arm   F > rearm_threshold for rearm_windows windows in a row forgets the onset

    Feed it the same numbers on every rank (reduce first): it knows no ranks, and its decision is
    a function of its state and input alone.

    Args:
        config: Settings; the defaults are those of `StoppingConfig`.

    Example:
        >>> rule = StoppingRule(StoppingConfig(kappa=2.0))
        >>> for step, ratio in enumerate([3.0, 0.8, 0.7, 0.6], start=1):
        ...     decision = rule.update(step=step, lr=0.1, ratio=ratio)
        >>> decision.stop, rule.state.onset_step, rule.state.stop_step
        (True, 2, 4)
    """

    def __init__(self, config: StoppingConfig | None = None) -> None:
        self.config = config if config is not None else StoppingConfig()
        self.state = StoppingState()

    def update(self, *, step: int, lr: float, ratio: float | None = None) -> StoppingDecision:
        """Account for one optimizer step, and for a window if one ended with it.

        Args:
            step: Optimizer steps so far, this one included.
            lr: Learning rate of this step.
            ratio: F if a window ended at this step, else None. NaN (no noise measured) counts
                as no window.

        Returns:
            The decision. Once `stop` is True it stays so.
        """
        before = self.state
        state = replace(before, lr_sum=before.lr_sum + lr)
        if ratio is not None and not math.isnan(ratio):
            state = _after_window(self.config, state, step, ratio)
        if state.stop_step is None and _is_due(self.config, state, step):
            state = replace(state, stop_step=step, reason=_stop_reason(self.config, state, step))
        self.state = state
        return StoppingDecision(
            stop=state.stop_step is not None,
            onset=state.onset_step == step and before.onset_step != step,
            reason=state.reason,
        )

    def predicted_stop_step(self, step: int, lr: float) -> int | None:
        """Step at which the run would stop if the learning rate stayed at `lr`.

        None without an onset, or with a learning rate of 0 before the stop.
        """
        state = self.state
        if state.stop_step is not None:
            return state.stop_step
        if state.onset_lr_sum is None:
            return None
        missing = self.config.kappa * state.onset_lr_sum - state.lr_sum
        if missing > 0 and lr <= 0:
            return None
        # The sums are of floats: without the slack, rounding may add a step.
        steps = max(0, math.ceil(missing / lr * (1 - 1e-9))) if missing > 0 else 0
        return max(step + steps, self.config.min_steps)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and None: safe for JSON and `weights_only` loading."""
        return asdict(self.state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state; keys that an older version did not write keep their defaults."""
        known = {field.name for field in fields(StoppingState)}
        self.state = StoppingState(**{k: v for k, v in state_dict.items() if k in known})


def _after_window(
    config: StoppingConfig, state: StoppingState, step: int, ratio: float
) -> StoppingState:
    state = replace(state, windows=state.windows + 1, signal_ratio=ratio)
    if state.stop_step is not None:
        return state
    if state.onset_step is not None:
        above = state.windows_above + 1 if ratio > config.rearm_threshold else 0
        if above < config.rearm_windows:
            return replace(state, windows_above=above)
        return replace(
            state,
            onset_step=None,
            onset_lr_sum=None,
            onset_ratio=None,
            windows_above=0,
            reason=f"onset forgotten at step {step}: F = {ratio:.3g} is above "
            f"{config.rearm_threshold:g} for {above} windows",
        )
    if state.armed and ratio < config.threshold and state.lr_sum > 0:
        return replace(
            state,
            onset_step=step,
            onset_lr_sum=state.lr_sum,
            onset_ratio=ratio,
            windows_above=0,
            reason=f"onset at step {step}: F = {ratio:.3g} is below {config.threshold:g}",
        )
    if not state.armed and ratio > config.arm_threshold:
        return replace(state, armed=True, reason=f"armed at step {step}: F = {ratio:.3g}")
    if not state.armed and state.windows == 1:
        return replace(state, reason=f"not armed: F = {ratio:.3g} at step {step}")
    return state


def _is_due(config: StoppingConfig, state: StoppingState, step: int) -> bool:
    if state.onset_lr_sum is None or step < config.min_steps:
        return False
    # Relative slack: kappa * sum and the longer sum round differently.
    return state.lr_sum >= config.kappa * state.onset_lr_sum * (1 - 1e-9)


def _stop_reason(config: StoppingConfig, state: StoppingState, step: int) -> str:
    return (
        f"stopped at step {step}: the training gradients carry no more signal than noise since "
        f"step {state.onset_step} (F = {state.onset_ratio:.3g} < {config.threshold:g}), and "
        f"{config.kappa:g} times that training time has passed; further training would mostly "
        "memorise"
    )

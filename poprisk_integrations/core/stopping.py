"""When to stop without validation data: arm, onset, stop at a multiple of the onset."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from poprisk_integrations.core._plain import check_settings, known_fields

__all__ = ["StoppingConfig", "StoppingDecision", "StoppingRule", "StoppingState"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoppingConfig:
    """Settings of the rule.

    The defaults were chosen on selection seeds of three tasks and frozen before the benchmark
    (`recipes/benchmarks/early_stopping`).

    Args:
        kappa: Stop at this multiple of the onset time, >= 1. On reused data the criterion
            crosses at half the best time (quadratic loss, gradient flow), hence 2.
        stretch: `kappa` grows with the fall of the gradient noise from its peak, up to this
            factor, >= 1. Where examples are fitted without residue (clean labels), little noise
            is left to memorise, and stopping early costs more than training on. 1 switches it
            off.
        threshold: F below this is the onset, > 0.
        confidence: F plus so many of its standard errors must be below the threshold, >= 0.
            Above 0 it delays the stop of runs with few effective dimensions; 0 was best.
        arm_threshold: F must exceed this once before an onset counts, >= threshold. A run that
            starts at pure noise has learned nothing that it could forget. Fine-tuning of language
            models starts little above 1 (1.1 with windows of one epoch in `poprisk demo`), so the
            bar is low.
        unarmed_windows: If no window ever armed the rule, the mean F of at least so many, plus
            its standard error, below the threshold counts as an onset at the first of them. Steps
            that overshoot make F < 1 from the start.
        rearm_threshold: F above this after the onset ...
        rearm_windows: ... for this many consecutive windows forgets the onset.
        min_steps: No stop before this many optimizer steps.

    Raises:
        ValueError: If a value is outside its range.
    """

    kappa: float = 2.0
    stretch: float = 1.5
    threshold: float = 1.0
    confidence: float = 0.0
    arm_threshold: float = 1.05
    unarmed_windows: int = 3
    rearm_threshold: float = 1.3
    rearm_windows: int = 2
    min_steps: int = 0

    def __post_init__(self) -> None:
        check_settings(
            self,
            kappa=(self.kappa >= 1.0, ">= 1"),
            stretch=(self.stretch >= 1.0, ">= 1"),
            threshold=(self.threshold > 0.0, "> 0"),
            confidence=(self.confidence >= 0.0, ">= 0"),
            arm_threshold=(self.arm_threshold >= self.threshold, ">= threshold"),
            unarmed_windows=(self.unarmed_windows >= 2, ">= 2"),
            rearm_threshold=(self.rearm_threshold >= self.threshold, ">= threshold"),
            rearm_windows=(self.rearm_windows >= 1, ">= 1"),
            min_steps=(self.min_steps >= 0, ">= 0"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StoppingState:
    """Everything the rule remembers: plain numbers, ready for JSON.

    Times are training times, sums of learning rates, and steps are optimizer steps.
    """

    lr_sum: float = 0.0  # training time so far
    windows: int = 0
    armed: bool = False  # F has exceeded the arm threshold
    # of the last window
    signal_ratio: float | None = None
    window_end: float = 0.0
    window_end_step: int | None = None
    window_middle: float | None = None
    window_middle_step: float | None = None
    # of the first window
    first_middle: float | None = None
    first_middle_step: float | None = None
    # over the windows so far, while not armed: of F, and of its squared standard error
    mean_ratio: float = 0.0
    mean_variance: float = 0.0
    noise_peak: float = 0.0  # largest noise of a window so far
    onset_step: int | None = None  # at which F was first seen below the threshold
    # Where a curve of F drawn at the middles of the windows crosses the threshold, as a time and
    # as a step earlier than `onset_step`.
    onset_lr_sum: float | None = None
    onset_at: float | None = None
    onset_ratio: float | None = None  # F at `onset_step`
    onset_kappa: float | None = None  # multiple of the onset time at which the run stops
    windows_above: int = 0  # in a row above the re-arm threshold since the onset
    stop_step: int | None = None  # final once set
    reason: str = "no window is complete yet"  # about the last change of mind


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
        onset    first window of reused data with F + confidence * se < threshold; its time tau_0
                 (a sum of learning rates) is where log F, put at the windows' middles, crosses
                 log threshold. Never armed: see `unarmed_windows`
        stop     first step with tau >= k tau_0,  k = kappa * clip(S_peak / S_onset, 1, stretch)
        re-arm   F > rearm_threshold for rearm_windows windows in a row forgets the onset

    An onset needs data that have been seen before: in a first pass over the data no example can
    have been memorised, and F < 1 there means that steps overshoot or that nothing is left to
    learn. So the rule never stops training that sees each example once.

    Where it must stay off: grokking and other delayed generalisation (memorising comes first,
    the signal later; the stop falls between) and epoch-wise double descent. Sorted, packed,
    re-weighted or curriculum data make batches that are not exchangeable, which F cannot see.

    Feed it the same numbers on every rank (reduce first): it knows no ranks, and its decision is
    a function of its state and input alone.

    Args:
        config: Settings; the defaults are those of `StoppingConfig`.

    Example:
        >>> rule = StoppingRule(StoppingConfig(kappa=2.0))
        >>> for step, ratio in enumerate([2.0, 0.5, 0.4, 0.4], start=1):
        ...     decision = rule.update(step=step, lr=0.1, ratio=ratio)
        >>> decision.stop, rule.state.onset_step, rule.state.stop_step
        (True, 2, 2)
    """

    def __init__(self, config: StoppingConfig | None = None) -> None:
        self.config = config if config is not None else StoppingConfig()
        self.state = StoppingState()

    def update(
        self,
        *,
        step: int,
        lr: float,
        ratio: float | None = None,
        ratio_se: float = 0.0,
        noise: float = 0.0,
        reused: bool = True,
    ) -> StoppingDecision:
        """Account for one optimizer step, and for a window if one ended with it.

        Args:
            step: Optimizer steps so far, this one included.
            lr: Learning rate of this step.
            ratio: F if a window ended at this step, else None. NaN (no noise measured) counts
                as no window.
            ratio_se: Its standard error; NaN counts as 0.
            noise: S of that window, summed over tensors; 0 if unknown.
            reused: Whether the window's examples had been trained on before.

        Returns:
            The decision. Once `stop` is True it stays so.
        """
        before = self.state
        state = replace(before, lr_sum=before.lr_sum + lr)
        if ratio is not None and not math.isnan(ratio):
            error = 0.0 if math.isnan(ratio_se) else ratio_se
            state = _after_window(self.config, state, step, ratio, error, noise, reused)
        if state.stop_step is None and _is_due(state, step, self.config):
            state = replace(state, stop_step=step, reason=_stop_reason(state, step, self.config))
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
        if state.onset_lr_sum is None or state.onset_kappa is None:
            return None
        missing = state.onset_kappa * state.onset_lr_sum - state.lr_sum
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
        values = known_fields(StoppingState, state_dict)
        if values.get("onset_lr_sum") is not None:
            values.setdefault("onset_kappa", self.config.kappa)
        self.state = StoppingState(**values)


def _after_window(
    config: StoppingConfig,
    before: StoppingState,
    step: int,
    ratio: float,
    ratio_se: float,
    noise: float,
    reused: bool,
) -> StoppingState:
    middle = (before.window_end + before.lr_sum) / 2
    # A state of a version that did not count steps has windows, but no step of their end.
    start = 0 if before.windows == 0 else before.window_end_step
    middle_step = float(step) if start is None else (start + step) / 2
    windows = before.windows + 1
    state = replace(
        before,
        windows=windows,
        signal_ratio=ratio,
        window_end=before.lr_sum,
        window_end_step=step,
        window_middle=middle,
        window_middle_step=middle_step,
        noise_peak=max(before.noise_peak, noise),
    )
    if before.windows == 0:
        state = replace(state, first_middle=middle, first_middle_step=middle_step)
    if not before.armed:
        state = replace(
            state,
            mean_ratio=before.mean_ratio + (ratio - before.mean_ratio) / windows,
            mean_variance=before.mean_variance + (ratio_se**2 - before.mean_variance) / windows,
        )
    if state.stop_step is not None:
        return state
    if state.onset_step is not None:
        return _after_onset(config, state, step, ratio)
    if not state.armed and ratio > config.arm_threshold:
        return replace(
            state,
            armed=True,
            reason=f"at step {step} batches agreed on a direction (F = {ratio:.3g}, above "
            f"{config.arm_threshold:.3g})",
        )
    onset = _onset(config, before, state, ratio + config.confidence * ratio_se)
    if onset is not None and onset[0] > 0 and reused:
        fall = state.noise_peak / noise if noise > 0 else 1.0
        return replace(
            state,
            onset_step=step,
            onset_lr_sum=onset[0],
            onset_at=onset[1],
            onset_ratio=ratio,
            onset_kappa=config.kappa * min(fall, config.stretch),
            windows_above=0,
            reason=f"at step {step} batches were seen to agree no more than chance explains "
            f"(F = {ratio:.3g} < {config.threshold:g}), since about step {onset[1]:.0f}",
        )
    if not state.armed and windows == 1:
        return replace(
            state,
            reason=f"batches have not agreed on a direction yet (F = {ratio:.3g} at step {step})",
        )
    return state


def _after_onset(
    config: StoppingConfig, state: StoppingState, step: int, ratio: float
) -> StoppingState:
    above = state.windows_above + 1 if ratio > config.rearm_threshold else 0
    if above < config.rearm_windows:
        return replace(state, windows_above=above)
    return replace(
        state,
        armed=True,
        onset_step=None,
        onset_lr_sum=None,
        onset_at=None,
        onset_ratio=None,
        onset_kappa=None,
        windows_above=0,
        reason=f"by step {step} batches agreed again (F = {ratio:.3g}, {above} windows above "
        f"{config.rearm_threshold:g}), so no stop is due any more",
    )


def _onset(
    config: StoppingConfig, before: StoppingState, state: StoppingState, bound: float
) -> tuple[float, float] | None:
    """Training time and step of the onset, or None if there is none in this window."""
    if not state.armed:
        # Independent windows; a correlation between them is what `unarmed_windows` is a guard for.
        error = math.sqrt(state.mean_variance / state.windows)
        is_low = state.mean_ratio + error < config.threshold
        if not is_low or state.windows < config.unarmed_windows or state.first_middle is None:
            return None
        return state.first_middle, state.first_middle_step or 0.0
    if bound >= config.threshold:
        return None
    middle, middle_step = state.window_middle, state.window_middle_step
    earlier, ratio = before.window_middle, before.signal_ratio
    assert middle is not None
    assert middle_step is not None
    if earlier is None or ratio is None or ratio <= config.threshold:
        return middle, middle_step
    fall = math.log(ratio / config.threshold)
    drop = math.log(config.threshold / max(bound, 1e-9 * config.threshold))
    share = fall / (fall + drop)
    earlier_step = middle_step if before.window_middle_step is None else before.window_middle_step
    return (
        earlier + (middle - earlier) * share,
        earlier_step + (middle_step - earlier_step) * share,
    )


def _is_due(state: StoppingState, step: int, config: StoppingConfig) -> bool:
    if state.onset_lr_sum is None or state.onset_kappa is None or step < config.min_steps:
        return False
    # Relative slack: kappa * sum and the longer sum round differently.
    return state.lr_sum >= state.onset_kappa * state.onset_lr_sum * (1 - 1e-9)


def _stop_reason(state: StoppingState, step: int, config: StoppingConfig) -> str:
    """What is known: when it began, when it was noticed, how long it waited since."""
    began = state.onset_step if state.onset_at is None else round(state.onset_at)
    kappa = f"{state.onset_kappa:.3g}"
    waited = (
        ""
        if kappa == "1"
        else f"; {kappa} times the training time up to there (the sum of the learning rates) has "
        "passed"
    )
    return (
        f"stopped at step {step}: batches agree no more than chance explains since about step "
        f"{began} (noticed at step {state.onset_step}, F = {state.onset_ratio:.3g} < "
        f"{config.threshold:g}){waited}"
    )

"""What a demo's numbers say and do not say, in sentences; a pure function of the numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from poprisk_integrations.cli.demo.comparison import Arm, Comparison, best_arm, find_arm

__all__ = ["Evidence", "findings"]

_GATE, _ADAMW = "PopRiskAdamW", "AdamW"
_SAME_FIT = 0.05  # share of the clean training pairs


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that the sentences rest on.

    Attributes:
        arms: The rows of the table.
        default_lr: The default learning rate.
        gate_vs_adamw: Learning rate -> PopRiskAdamW against AdamW there, both without the stop.
        best_vs_best: PopRiskAdamW against AdamW, each at its best learning rate of the sweep.
        stop_vs_end: (optimizer, learning rate) -> stopped run against the same run to its end,
            for the runs that the stop ended.
        not_armed: Runs in which the stop never saw enough signal to be armed.
        quick: Whether the sizes are those of a quick run.
    """

    arms: Sequence[Arm]
    default_lr: float
    gate_vs_adamw: Mapping[float, Comparison]
    best_vs_best: Comparison
    stop_vs_end: Mapping[tuple[str, float], Comparison]
    not_armed: int
    quick: bool


def findings(evidence: Evidence) -> list[str]:
    """One paragraph each: default, sweep, timing, mechanism, stop, limits."""
    return [
        _at_the_default(evidence),
        _over_the_sweep(evidence),
        _at_the_best_moment(evidence),
        _mechanism(evidence),
        _stop(evidence),
        _limits(evidence),
    ]


def _at_the_default(evidence: Evidence) -> str:
    gate, adamw = (
        find_arm(evidence.arms, name, evidence.default_lr, stop=False) for name in (_GATE, _ADAMW)
    )
    return (
        f"Default learning rate {_rate(evidence.default_lr)}, all {gate.steps} steps: "
        f"{_GATE} {_percent(gate.accuracy)} of the clean held-out pairs, {_ADAMW} "
        f"{_percent(adamw.accuracy)}. {_result(evidence.gate_vs_adamw[evidence.default_lr])}"
    )


def _over_the_sweep(evidence: Evidence) -> str:
    best = {name: best_arm(evidence.arms, name) for name in (_GATE, _ADAMW)}
    spans = {name: _span(evidence.arms, name) for name in (_GATE, _ADAMW)}
    text = (
        f"Each at its best learning rate of the sweep: {_GATE} {_percent(best[_GATE].accuracy)} "
        f"({_rate(best[_GATE].learning_rate)}), {_ADAMW} {_percent(best[_ADAMW].accuracy)} "
        f"({_rate(best[_ADAMW].learning_rate)}). {_result(evidence.best_vs_best)} "
        f"Across the sweep the accuracy varies by {_points(spans[_GATE])} for {_GATE} and by "
        f"{_points(spans[_ADAMW])} for {_ADAMW}. "
    )
    return text + _sweep_conclusion(evidence, steadier=spans[_GATE] < spans[_ADAMW])


def _sweep_conclusion(evidence: Evidence, *, steadier: bool) -> str:
    at_default = evidence.gate_vs_adamw[evidence.default_lr].verdict
    at_best = evidence.best_vs_best.verdict
    if at_best == "ahead":
        return (
            f"So here {_GATE} is ahead even of {_ADAMW} at its best rate of these three; whether a "
            f"finer sweep or fewer steps would close the gap, this run does not show."
        )
    if at_best == "behind":
        return f"So with a tuned learning rate {_ADAMW} is the better choice here" + (
            f"; {_GATE} only spares some of the tuning." if steadier else "."
        )
    if steadier and (at_default == "ahead" or _leads_somewhere(evidence)):
        return (
            "So the gain is robustness to the learning rate, not a better optimum: "
            f"{_ADAMW} with a well-chosen rate does as well."
        )
    return f"So this run shows no advantage of {_GATE} in accuracy."


def _leads_somewhere(evidence: Evidence) -> bool:
    return any(item.verdict == "ahead" for item in evidence.gate_vs_adamw.values())


def _at_the_best_moment(evidence: Evidence) -> str:
    gate, adamw = (
        find_arm(evidence.arms, name, evidence.default_lr, stop=False) for name in (_GATE, _ADAMW)
    )
    difference = gate.peak_accuracy - adamw.peak_accuracy
    noise = 2 * max(gate.accuracy_se, adamw.accuracy_se)
    if abs(difference) <= noise:
        ending = "about the same: ended at the right moment, AdamW needs no gate"
    elif difference > 0:
        ending = f"{_GATE}'s is higher"
    else:
        ending = f"{_ADAMW}'s is higher: ended at the right moment, it is better without the gate"
    return (
        f"Best moment on the way, known only to who has clean labels: {_GATE} "
        f"{_percent(gate.peak_accuracy)} (step {gate.peak_step}), {_ADAMW} "
        f"{_percent(adamw.peak_accuracy)} (step {adamw.peak_step}) at "
        f"{_rate(evidence.default_lr)}; {ending}."
    )


def _mechanism(evidence: Evidence) -> str:
    gate, adamw = (
        find_arm(evidence.arms, name, evidence.default_lr, stop=False) for name in (_GATE, _ADAMW)
    )
    text = (
        f"Labels: {_ADAMW} fits {_percent(adamw.swapped_fitted, 0)} of the wrong ones and "
        f"{_percent(adamw.clean_fitted, 0)} of the right ones, {_GATE} "
        f"{_percent(gate.swapped_fitted, 0)} and {_percent(gate.clean_fitted, 0)}. "
    )
    fewer_wrong = adamw.swapped_fitted - gate.swapped_fitted > _SAME_FIT
    fewer_right = adamw.clean_fitted - gate.clean_fitted > _SAME_FIT
    if fewer_wrong and not fewer_right:
        text += "The gate leaves wrong labels unfitted while it fits the right ones."
    elif fewer_wrong:
        text += "The gate fits less of both, as a smaller step would."
    else:
        text += "The gate does not keep the wrong labels from being fitted."
    return text + _slower_adamw(evidence, gate)


def _slower_adamw(evidence: Evidence, gate: Arm) -> str:
    """Set the gate beside AdamW at a lower rate: how much of its effect is a smaller step?"""
    slower = [
        arm
        for arm in evidence.arms
        if arm.optimizer == _ADAMW and not arm.stop and arm.learning_rate < evidence.default_lr
    ]
    if not slower:
        return ""
    near = min(slower, key=lambda arm: abs(arm.drift - gate.drift))
    return (
        f" At a comparable distance from the reference ({_ADAMW} at {_rate(near.learning_rate)}: "
        f"drift {near.drift:.2f} against {gate.drift:.2f}), {_ADAMW} has "
        f"{_percent(near.accuracy)} against {_percent(gate.accuracy)} and "
        f"{_percent(near.swapped_fitted, 0)} against {_percent(gate.swapped_fitted, 0)} of the "
        "wrong labels."
    )


def _stop(evidence: Evidence) -> str:
    runs = sum(not arm.stop for arm in evidence.arms)
    stopped = [arm for arm in evidence.arms if arm.stopped]
    if not stopped:
        why = (
            f" In {evidence.not_armed} of them the gradients never agreed enough to arm it."
            if evidence.not_armed
            else " The runs are too short for it."
        )
        return f"The stop ended none of the {runs} runs: its rows repeat those without it.{why}"
    details = []
    for arm in stopped:
        end = find_arm(evidence.arms, arm.optimizer, arm.learning_rate, stop=False)
        verdict = evidence.stop_vs_end[arm.optimizer, arm.learning_rate].verdict
        details.append(
            f"{arm.optimizer} {_rate(arm.learning_rate)} at step {arm.steps} of {end.steps} "
            f"({_percent(arm.accuracy)}, at the end {_percent(end.accuracy)}: {verdict})"
        )
    helped = sum(item.verdict == "ahead" for item in evidence.stop_vs_end.values())
    hurt = sum(item.verdict == "behind" for item in evidence.stop_vs_end.values())
    seen = "".join(
        f" {arm.optimizer} {_rate(arm.learning_rate)} was {arm.finding}."
        for arm in stopped
        if arm.finding
    )
    judgement = (
        f"It helped in {helped} and hurt in {hurt}."
        if helped or hurt
        else "It changed no accuracy by more than noise; it saved the remaining steps."
    )
    late = [arm for arm in stopped if arm.peak_accuracy - arm.accuracy > 2 * arm.accuracy_se]
    if late:
        judgement += (
            f" In {len(late)} of these runs the best moment had passed well before: it came late."
        )
    return (
        f"The stop ended {len(stopped)} of the {runs} runs: {'; '.join(details)}.{seen} {judgement}"
    )


def _limits(evidence: Evidence) -> str:
    error = max(arm.accuracy_se for arm in evidence.arms)
    text = (
        "Not shown: anything about other data, larger models, or labels that are wrong in a "
        "systematic way. It is one seed of one very small model, with labels swapped at random; "
        f"an accuracy here has a standard error of {_points(error)} or less over the held-out "
        "pairs, and more from seed to seed (try --seed)."
    )
    if evidence.quick:
        text = "A quick run only shows that everything works: its numbers mean little. " + text
    return text


def _result(comparison: Comparison) -> str:
    size = (
        f"{_points(abs(comparison.difference))} "
        f"(standard error {_points(comparison.standard_error)})"
    )
    if comparison.verdict == "level":
        return f"That is level: the difference of {size} is within noise."
    return f"{_GATE} is {comparison.verdict} by {size}."


def _span(arms: Sequence[Arm], optimizer: str) -> float:
    values = [arm.accuracy for arm in arms if arm.optimizer == optimizer and not arm.stop]
    return max(values) - min(values)


def _percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %"


def _points(value: float) -> str:
    return f"{100 * value:.1f} points"


def _rate(value: float) -> str:
    return f"{value:.3g}"

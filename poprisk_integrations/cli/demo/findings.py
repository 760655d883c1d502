"""What a demo's numbers say and do not say, in sentences; a pure function of the numbers."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Arm", "Comparison", "Evidence", "findings"]

_GATE, _ADAMW = "PopRiskAdamW", "AdamW"
_SAME_FIT = 0.05  # share of the clean training pairs
_STANDARD_ERRORS = 2.0


@dataclass(frozen=True, slots=True)
class Arm:
    """One row of the table: an optimizer at a learning rate, to the end or to the stop."""

    optimizer: str
    stop: bool  # whether the stop was allowed to end the run
    learning_rate: float  # constant over the run
    steps: int  # optimizer steps done
    stopped: bool  # whether the stop did end the run
    accuracy: float  # share of the clean held-out pairs ranked correctly
    accuracy_se: float  # standard error of it over pairs
    swapped_fitted: float  # share of swapped training pairs ranked as their wrong label says
    clean_fitted: float  # share of clean training pairs ranked as labelled
    drift: float  # mean absolute reward over the held-out continuations
    peak_accuracy: float  # highest accuracy measured on the way, with labels that nobody has
    peak_step: int  # where
    finding: str = ""  # what the windows said at the stop; "" where it did not end the run


@dataclass(frozen=True, slots=True)
class Comparison:
    """Accuracy of one arm minus that of another; the error is paired over held-out pairs."""

    difference: float
    standard_error: float

    @property
    def verdict(self) -> str:
        """One of "ahead", "behind" and "level" (within two standard errors)."""
        if abs(self.difference) <= _STANDARD_ERRORS * self.standard_error:
            return "level"
        return "ahead" if self.difference > 0 else "behind"


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that the sentences rest on."""

    arms: Sequence[Arm]
    default_lr: float
    compare: Callable[[Arm, Arm], Comparison]  # the first minus the second
    not_armed: int  # runs in which the stop never saw enough signal to be armed
    quick: bool

    def to_end(self, optimizer: str) -> dict[float, Arm]:
        """The rows of the runs without the stop, by learning rate."""
        found = [arm for arm in self.arms if arm.optimizer == optimizer and not arm.stop]
        return {arm.learning_rate: arm for arm in found}

    def best(self, optimizer: str) -> Arm:
        """The most accurate row without the stop; among equals that with the least drift.

        It is chosen on the held-out pairs, so its accuracy flatters it a little.
        """
        return max(self.to_end(optimizer).values(), key=lambda arm: (arm.accuracy, -arm.drift))

    def gate_vs_adamw(self) -> dict[float, Comparison]:
        """By learning rate, both to the end."""
        adamw = self.to_end(_ADAMW)
        return {r: self.compare(arm, adamw[r]) for r, arm in self.to_end(_GATE).items()}

    def best_vs_best(self) -> Comparison:
        """The gate against AdamW, each at its best rate of the sweep."""
        return self.compare(self.best(_GATE), self.best(_ADAMW))

    def stopped(self) -> list[tuple[Arm, Arm, Comparison]]:
        """Runs that the stop ended, the same runs to their end, and how these compare."""
        arms = [arm for arm in self.arms if arm.stopped]
        ends = [self.to_end(arm.optimizer)[arm.learning_rate] for arm in arms]
        return [(arm, end, self.compare(arm, end)) for arm, end in zip(arms, ends, strict=True)]

    def comparisons(self) -> list[dict[str, Any]]:
        """All of them as plain values."""

        def row(comparison: Comparison, kind: str, **of: Any) -> dict[str, Any]:
            return {"kind": kind, **of, **asdict(comparison), "verdict": comparison.verdict}

        return [
            *(row(c, "gate_vs_adamw", learning_rate=r) for r, c in self.gate_vs_adamw().items()),
            row(self.best_vs_best(), "best_vs_best"),
            *(
                row(c, "stop_vs_end", optimizer=a.optimizer, learning_rate=a.learning_rate)
                for a, _, c in self.stopped()
            ),
        ]


def findings(evidence: Evidence) -> list[str]:
    """One paragraph each: default, sweep, timing, mechanism, stop, limits."""
    rate = evidence.default_lr
    gate, adamw = evidence.to_end(_GATE)[rate], evidence.to_end(_ADAMW)[rate]
    return [
        f"Default learning rate {_rate(rate)}, all {gate.steps} steps: "
        f"{_GATE} {_percent(gate.accuracy)} of the clean held-out pairs, {_ADAMW} "
        f"{_percent(adamw.accuracy)}. {_result(evidence.gate_vs_adamw()[rate])}",
        _over_the_sweep(evidence),
        _at_the_best_moment(gate, adamw),
        _mechanism(evidence, gate, adamw),
        _stop(evidence),
        _limits(evidence),
    ]


def _over_the_sweep(evidence: Evidence) -> str:
    best, span = {}, {}
    for name in (_GATE, _ADAMW):
        best[name] = evidence.best(name)
        values = [arm.accuracy for arm in evidence.to_end(name).values()]
        span[name] = max(values) - min(values)
    comparison = evidence.best_vs_best()
    leads_somewhere = any(item.verdict == "ahead" for item in evidence.gate_vs_adamw().values())
    is_steadier = span[_GATE] < span[_ADAMW]
    if comparison.verdict == "ahead":
        ending = (
            f"So here {_GATE} is ahead even of {_ADAMW} at its best rate of these three; whether a "
            f"finer sweep or fewer steps would close the gap, this run does not show."
        )
    elif comparison.verdict == "behind":
        ending = f"So with a tuned learning rate {_ADAMW} is the better choice here" + (
            f"; {_GATE} only spares some of the tuning." if is_steadier else "."
        )
    elif is_steadier and leads_somewhere:
        ending = (
            "So the gain is robustness to the learning rate, not a better optimum: "
            f"{_ADAMW} with a well-chosen rate does as well."
        )
    else:
        ending = f"So this run shows no advantage of {_GATE} in accuracy."
    at_best = ", ".join(
        f"{name} {_percent(arm.accuracy)} ({_rate(arm.learning_rate)})"
        for name, arm in best.items()
    )
    return (
        f"Each at its best learning rate of the sweep: {at_best}. {_result(comparison)} "
        f"Across the sweep the accuracy varies by {_points(span[_GATE])} for {_GATE} and by "
        f"{_points(span[_ADAMW])} for {_ADAMW}. {ending}"
    )


def _at_the_best_moment(gate: Arm, adamw: Arm) -> str:
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
        f"{_rate(gate.learning_rate)}; {ending}."
    )


def _mechanism(evidence: Evidence, gate: Arm, adamw: Arm) -> str:
    fewer_wrong = adamw.swapped_fitted - gate.swapped_fitted > _SAME_FIT
    fewer_right = adamw.clean_fitted - gate.clean_fitted > _SAME_FIT
    if fewer_wrong and not fewer_right:
        ending = "The gate leaves wrong labels unfitted while it fits the right ones."
    elif fewer_wrong:
        ending = "The gate fits less of both, as a smaller step would."
    else:
        ending = "The gate does not keep the wrong labels from being fitted."
    # Beside AdamW at a lower rate: how much of the gate's effect is a smaller step?
    slower = [a for rate, a in evidence.to_end(_ADAMW).items() if rate < evidence.default_lr]
    if slower:
        near = min(slower, key=lambda arm: abs(arm.drift - gate.drift))
        ending += (
            f" At a comparable distance from the reference ({_ADAMW} at "
            f"{_rate(near.learning_rate)}: drift {near.drift:.2f} against {gate.drift:.2f}), "
            f"{_ADAMW} has {_percent(near.accuracy)} against {_percent(gate.accuracy)} and "
            f"{_percent(near.swapped_fitted, 0)} against {_percent(gate.swapped_fitted, 0)} of the "
            "wrong labels."
        )
    return (
        f"Labels: {_ADAMW} fits {_percent(adamw.swapped_fitted, 0)} of the wrong ones and "
        f"{_percent(adamw.clean_fitted, 0)} of the right ones, {_GATE} "
        f"{_percent(gate.swapped_fitted, 0)} and {_percent(gate.clean_fitted, 0)}. {ending}"
    )


def _stop(evidence: Evidence) -> str:
    runs = sum(not arm.stop for arm in evidence.arms)
    stopped = evidence.stopped()
    if not stopped:
        why = (
            f"In {evidence.not_armed} of them the gradients never agreed enough to arm it."
            if evidence.not_armed
            else "The runs are too short for it."
        )
        return (
            f"The stop by the signal ratio ended none of the {runs} runs: its rows repeat those "
            f"without it. {why}"
        )
    details, seen, late = [], "", 0
    for arm, end, comparison in stopped:
        name = f"{arm.optimizer} {_rate(arm.learning_rate)}"
        details.append(
            f"{name} at step {arm.steps} of {end.steps} ({_percent(arm.accuracy)}, at the end "
            f"{_percent(end.accuracy)}: {comparison.verdict})"
        )
        seen += f" {name} was {arm.finding}." if arm.finding else ""
        late += arm.peak_accuracy - arm.accuracy > 2 * arm.accuracy_se
    verdicts = [comparison.verdict for *_, comparison in stopped]
    helped, hurt = verdicts.count("ahead"), verdicts.count("behind")
    judgement = (
        f"It helped in {helped} and hurt in {hurt}."
        if helped or hurt
        else "It changed no accuracy by more than noise; it saved the remaining steps."
    )
    if late:
        judgement += (
            f" In {late} of these runs the best moment had passed well before: it came late."
        )
    return (
        f"The stop by the signal ratio ended {len(stopped)} of the {runs} runs: "
        f"{'; '.join(details)}.{seen} {judgement}"
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


def _percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %"


def _points(value: float) -> str:
    return f"{100 * value:.1f} points"


def _rate(value: float) -> str:
    return f"{value:.3g}"

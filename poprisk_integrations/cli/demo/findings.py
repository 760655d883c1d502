"""What a demo's numbers say and do not say, in sentences; a pure function of the numbers."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Arm", "Comparison", "Evidence", "findings", "next_steps"]

_STANDARD_ERRORS = 2.0


@dataclass(frozen=True, slots=True)
class Arm:
    """One row of the table: a way to a model."""

    name: str
    trainings: float  # price: steps of all that was trained for it, over those of plain training
    accuracy: float  # share of the clean held-out pairs ranked correctly
    accuracy_se: float  # standard error of it over pairs
    swapped_fitted: float  # share of swapped training pairs ranked as their wrong label says
    clean_fitted: float  # share of clean training pairs ranked as labelled
    drift: float  # mean absolute reward over the held-out continuations
    peak_accuracy: float | None = None  # after the best epoch, by labels that nobody has
    peak_epoch: int | None = None


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

    arms: Mapping[str, Arm]  # "plain", "held out", "ours", "folds"
    compare: Callable[[str, str], Comparison]  # the first minus the second
    suspects: Mapping[str, Any]  # what the flip report found of the swapped labels
    estimate: str  # of the share of wrong labels, in words
    calibrated: bool  # whether P(wrong) is a probability
    swapped_share: float
    quick: bool

    def comparisons(self) -> list[dict[str, Any]]:
        """All that are spoken of, as plain values."""
        return [
            {"arm": arm, "minus": base, **asdict(found), "verdict": found.verdict}
            for arm, base in (("folds", "plain"), ("folds", "held out"), ("ours", "plain"))
            for found in [self.compare(arm, base)]
        ]


def findings(evidence: Evidence) -> list[str]:
    """One paragraph each: suspects, mean of the folds, our trainer, labels, limits."""
    arms = evidence.arms
    plain, folds, ours = arms["plain"], arms["folds"], arms["ours"]
    return [
        _suspects(evidence),
        f"The {folds.name}: {_percent(folds.accuracy)} of the clean held-out pairs. "
        f"{_against(evidence, 'folds', 'plain')} {_against(evidence, 'folds', 'held out')} "
        f"Nothing was held out for it; its price is {folds.trainings:.1f} trainings.",
        f"{ours.name}, one training, nothing held out: {_percent(ours.accuracy)}. "
        f"{_against(evidence, 'ours', 'plain')}",
        f"Labels: plain training ends with {_percent(plain.swapped_fitted, 0)} of the wrong labels "
        f"fitted beside {_percent(plain.clean_fitted, 0)} of the right ones, the {folds.name} with "
        f"{_percent(folds.swapped_fitted, 0)} and {_percent(folds.clean_fitted, 0)}. "
        f"{_best_moment(plain, folds)}",
        _limits(evidence),
    ]


def next_steps(evidence: Evidence) -> tuple[str, list[str]]:
    """What one would do now with pairs of one's own: why, and the commands."""
    check = "poprisk check pairs.jsonl"
    train = "--config mine/config.yaml --dataset_name pairs.jsonl"
    if evidence.compare("folds", "plain").verdict == "ahead":
        why = "the mean of the fold models was worth its price here, and it names the suspects"
        command = f"poprisk clean {train} --optim adamw_torch"
    elif evidence.compare("ours", "plain").verdict == "ahead":
        why = "PopRiskDPOTrainer was ahead of plain training for one training's price"
        command = f"poprisk dpo {train}"
    else:
        why = "nothing was ahead by more than noise here; what costs one training is enough"
        command = f"poprisk dpo {train}"
    return why, [check, "poprisk recipes copy dpo-noisy-qwen2.5-0.5b mine", command]


def _suspects(evidence: Evidence) -> str:
    found = evidence.suspects
    text = (
        f"Suspects, judged by models that never saw them: {evidence.estimate}; "
        f"{_percent(evidence.swapped_share, 0)} were swapped."
    )
    if found["auc"] is not None:
        text += (
            f" A swapped label is ranked above a right one with probability {found['auc']:.2f} "
            "(AUC)."
        )
    if not evidence.calibrated:
        return text + " P(wrong) is a ranking here: look at its top, and cut nowhere."
    if not found["flagged"]:
        return text + " No label is more probably wrong than right."
    return text + (
        f" Of the {found['flagged']} pairs with P(wrong) of 0.5 or more, "
        f"{_percent(found['precision'], 0)} were swapped."
    )


def _against(evidence: Evidence, first: str, second: str) -> str:
    found = evidence.compare(first, second)
    base = evidence.arms[second]
    size = f"{_points(abs(found.difference))} (standard error {_points(found.standard_error)})"
    other = f"{base.name} ({_percent(base.accuracy)})"
    if found.verdict == "level":
        return f"Level with {other}: the difference of {size} is within noise."
    return f"{found.verdict.capitalize()} {'of ' if found.difference > 0 else ''}{other} by {size}."


def _best_moment(plain: Arm, folds: Arm) -> str:
    if plain.peak_accuracy is None:
        return ""
    text = (
        f"Ended after its best epoch ({plain.peak_epoch}), which only clean labels show, plain "
        f"training would have {_percent(plain.peak_accuracy)}"
    )
    noise = _STANDARD_ERRORS * max(plain.accuracy_se, folds.accuracy_se)
    if abs(plain.peak_accuracy - folds.accuracy) <= noise:
        return f"{text}, about as much as the {folds.name}."
    more = "more" if plain.peak_accuracy > folds.accuracy else "less"
    return f"{text}, {more} than the {folds.name}."


def _limits(evidence: Evidence) -> str:
    error = max(arm.accuracy_se for arm in evidence.arms.values())
    text = (
        "Not shown: anything about other data, larger models, other learning rates, or labels that "
        "are wrong in a systematic way. It is one seed of one very small model, with labels "
        f"swapped at random; an accuracy here has a standard error of {_points(error)} or less "
        "over the held-out pairs, and more from seed to seed (try --seed)."
    )
    if evidence.quick:
        text = "A quick run only shows that everything works: its numbers mean little. " + text
    return text


def _percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %"


def _points(value: float) -> str:
    return f"{100 * value:.1f} points"

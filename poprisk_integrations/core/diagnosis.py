"""What the windows of a run say together, in words: the one place where it is said."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from poprisk_integrations.core._plain import number
from poprisk_integrations.core.risk_curve import RiskTrend, risk_trend

__all__ = ["PHRASES", "Diagnosis", "diagnose"]

Kind = Literal["unclear", "learning", "overshooting", "memorising"]

# Every phrase that a log line, a report, the probe or the demo may use; core/README.md has them
# as a table.
PHRASES: Mapping[str, str] = {
    "unclear": "cannot tell yet whether batches still agree on a direction",
    "unclear, nothing measured": "cannot tell yet: no window of steps has been measured",
    "unclear, first pass": "cannot tell yet: batches hardly agree on a direction any more, but "
    "each example was seen only once, so nothing can have been memorised",
    "learning": "still learning: batches agree on a direction more than chance explains",
    "overshooting": "overshooting: steps undo each other although batches agree, so the learning "
    "rate is too high",
    "memorising": "memorising: batches agree no more than chance explains, so what is still "
    "learned belongs to single examples (wrong labels too; if all labels are right, the accuracy "
    "on new data may still rise)",
    "unclear, test loss": "cannot tell whether the test loss still falls or has begun to rise",
    "unclear, test loss, first pass": "cannot tell yet: each example was seen only once, so the "
    "training loss is the test loss",
    "learning, test loss": "still learning: the test loss falls",
    "overshooting, test loss": "overshooting: test loss and training loss rise together, so the "
    "learning rate is too high",
    "memorising, test loss": "memorising: the test loss has risen from its minimum and the "
    "training loss has not, so what is still learned belongs to single examples (if all labels "
    "are right, the accuracy on new data may still rise)",
}
ADVICE: Mapping[Kind, str] = {
    "unclear": "train on; more windows would tell",
    "learning": "train on",
    "overshooting": "try a learning rate a third as large, or a schedule that decays",
    "memorising": "if labels may be wrong, keep the weights of the stop; if they are right, a "
    "schedule that decays to zero does as well or better",
}
_NAMES: Mapping[Kind, str] = {
    "unclear": "cannot tell whether it memorises",
    "learning": "still learning",
    "overshooting": "overshooting",
    "memorising": "memorising",
}
_SURE, _LIKELY = 2.0, 1.0  # standard errors from the threshold
_LAST = 3  # windows that count where nothing has happened yet
_OWN = 0.5  # share of the test loss's rise that the training loss must not have made
_PICKED = 0.5  # standard errors by which the lowest of several windows lies too low


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """One of four findings, how sure it is, and the numbers behind it.

    Attributes:
        kind: "unclear", "learning", "overshooting" or "memorising".
        certainty: "very probably", "probably", or "" for "unclear".
        phrase: From `PHRASES`.
        numbers: What it rests on.
    """

    kind: Kind
    certainty: str
    phrase: str
    numbers: str

    @property
    def short(self) -> str:
        """The finding in a few words, for a line that says other things too."""
        name = _NAMES[self.kind]
        return f"{self.certainty} {name}" if self.certainty else name

    @property
    def advice(self) -> str:
        """What to do about it."""
        return ADVICE[self.kind]

    def __str__(self) -> str:
        """The finding in words, with its numbers in brackets."""
        said = f"{self.certainty} {self.phrase}" if self.certainty else self.phrase
        return f"{said} ({self.numbers})" if self.numbers else said


def diagnose(
    rows: Iterable[Mapping[str, Any]], *, since: float | None = None, threshold: float = 1.0
) -> Diagnosis:
    """Tell learning, overshooting and memorising apart, or say that it cannot be told.

    From rows with an estimated test loss R (`risk_trend`: up and down are standard errors of the
    change since the lowest window, less 0.5 since that was picked for being low, and since three
    windows before; the larger one counts):

        memorising      up >= z, and the training loss made less than half of the rise
        overshooting    up >= z, and it made half of it or more
        learning        down >= z
        unclear         anything else

    From rows without, over k windows, with F = `signal_ratio`, C = `risk_decrease`, U = `agreement`
    (means; the standard error of a mean is sqrt(sum se^2) / k):

        overshooting    C + 2 se < 0 < U - 2 se      steps undo each other, batches agree
        memorising      F + z se < threshold, and the examples had been trained on before
        learning        F - z se > threshold
        unclear         anything else

    z = 2 is "very probably", z = 1 "probably". The windows of F are those after `since`: the one
    that ended there was picked for being low, and counts only while it is the last. Without
    `since`, the last three.

    Args:
        rows: One per window, in order, as in `history` and `poprisk_stop.json`; None where
            something was not measured.
        since: Optimizer step of the onset; None if there is none.
        threshold: Below this F is called small.

    Example:
        >>> row = {"step": 8, "signal_ratio": 0.97, "signal_ratio_se": 0.41, "reused": True}
        >>> diagnose([row]).kind
        'unclear'
        >>> found = diagnose([{**row, "signal_ratio": 0.4, "signal_ratio_se": 0.1}])
        >>> found.certainty, found.kind
        ('very probably', 'memorising')
    """
    rows = list(rows)
    trend = risk_trend(rows)
    if trend is not None:
        return _of_test_loss(trend, rows)
    windows = [row for row in rows if number(row, "signal_ratio") is not None]
    if not windows:
        return _found("unclear", "", "unclear, nothing measured", "")
    if since is None:
        windows = windows[-_LAST:]
    else:
        windows = [row for row in windows if row["step"] > since] or windows[-1:]
    ratio, error = _mean(windows, "signal_ratio")
    gain, gain_error = _mean(windows, "risk_decrease")
    agreement, agreement_error = _mean(windows, "agreement")
    count = "1 window" if len(windows) == 1 else f"{len(windows)} windows"
    side = "above" if ratio > threshold else "below"
    level = "1 is chance alone" if threshold == 1.0 else f"{side} {threshold:g}"
    numbers = f"F = {_with_error(ratio, error)} over {count}, {level}"
    if gain + _SURE * gain_error < 0 < agreement - _SURE * agreement_error:
        numbers += (
            f"; C = {_with_error(gain, gain_error)}, U = {_with_error(agreement, agreement_error)}"
        )
        return _found("overshooting", "very probably", "overshooting", numbers)
    # With an error of 0 or none there is nothing to be sure with.
    distance = abs(ratio - threshold) / error if error > 0 else 0.0
    certainty = "very probably" if distance >= _SURE else "probably"
    is_reused = all(row.get("reused") is not False for row in windows)
    if distance < _LIKELY:
        return _found("unclear", "", "unclear", numbers)
    if ratio > threshold:
        return _found("learning", certainty, "learning", numbers)
    if not is_reused:
        return _found("unclear", "", "unclear, first pass", numbers)
    return _found("memorising", certainty, "memorising", numbers)


def _of_test_loss(trend: RiskTrend, rows: Sequence[Mapping[str, Any]]) -> Diagnosis:
    numbers = f"R = {_with_error(trend.value, trend.se, digits=3)}"
    if trend.best < trend.value:
        numbers += f", lowest {trend.best:.3g} at step {trend.best_step}"
    numbers += "" if trend.train_loss is None else f"; training loss {trend.train_loss:.3g}"
    rise = trend.rise - _PICKED
    distance = max(rise, trend.fall)
    certainty = "very probably" if distance >= _SURE else "probably"
    if distance < _LIKELY:
        is_first_pass = all((number(row, "epoch") or math.inf) <= 1.0 for row in rows)
        phrase = "unclear, test loss, first pass" if is_first_pass else "unclear, test loss"
        return _found("unclear", "", phrase, numbers)
    kind: Kind = "learning"
    if rise > trend.fall:
        kind = "overshooting" if trend.gap_rise <= _OWN else "memorising"
    return _found(kind, certainty, f"{kind}, test loss", numbers)


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[float, float]:
    """Mean and its standard error; NaN where a window lacks one of them."""
    pairs = [(number(row, name), number(row, f"{name}_se")) for row in rows]
    values = [math.nan if value is None else value for value, _ in pairs]
    squares = [math.nan if error is None else error**2 for _, error in pairs]
    return sum(values) / len(rows), math.sqrt(sum(squares)) / len(rows)


def _with_error(value: float, error: float, digits: int = 2) -> str:
    text = f"{value:.{digits}g}"
    return f"{text} +- {error:.2g}" if math.isfinite(error) else text


def _found(kind: Kind, certainty: str, phrase: str, numbers: str) -> Diagnosis:
    return Diagnosis(kind=kind, certainty=certainty, phrase=PHRASES[phrase], numbers=numbers)

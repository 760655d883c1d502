"""What the windows of a run say together, in words: the one place where it is said."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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
}
ADVICE: Mapping[Kind, str] = {
    "unclear": "train on; longer windows or more epochs would tell",
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

    Over k windows, with F = `signal_ratio`, C = `risk_decrease`, U = `agreement` (means; the
    standard error of a mean is sqrt(sum se^2) / k):

        overshooting    C + 2 se < 0 < U - 2 se      steps undo each other, batches agree
        memorising      F + z se < threshold, and the examples had been trained on before
        learning        F - z se > threshold
        unclear         anything else

    z = 2 is "very probably", z = 1 "probably". The windows are those after `since`: the one that
    ended there was picked for being low, and counts only while it is the last. Without `since`,
    the last three.

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
    windows = _that_count([row for row in rows if _number(row, "signal_ratio") is not None], since)
    if not windows:
        return _found("unclear", "", "unclear, nothing measured", "")
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


def _that_count(
    rows: Sequence[Mapping[str, Any]], since: float | None
) -> Sequence[Mapping[str, Any]]:
    if since is None:
        return rows[-_LAST:]
    return [row for row in rows if row["step"] > since] or rows[-1:]


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[float, float]:
    """Mean and its standard error; NaN where a window lacks one of them."""
    pairs = [(_number(row, name), _number(row, f"{name}_se")) for row in rows]
    values = [math.nan if value is None else value for value, _ in pairs]
    squares = [math.nan if error is None else error**2 for _, error in pairs]
    return sum(values) / len(rows), math.sqrt(sum(squares)) / len(rows)


def _number(row: Mapping[str, Any], name: str) -> float | None:
    value = row.get(name)
    is_number = isinstance(value, (int, float)) and math.isfinite(value)
    return float(value) if is_number else None  # type: ignore[arg-type]


def _with_error(value: float, error: float) -> str:
    return f"{value:.2g} +- {error:.2g}" if math.isfinite(error) else f"{value:.2g}"


def _found(kind: Kind, certainty: str, phrase: str, numbers: str) -> Diagnosis:
    return Diagnosis(kind=kind, certainty=certainty, phrase=PHRASES[phrase], numbers=numbers)

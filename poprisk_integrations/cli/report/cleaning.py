"""What `poprisk clean` left in a run: read, said, and set beside each other, before and after."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from poprisk_integrations.cli.report.run import Run, number

__all__ = ["Cleaning", "before_and_after", "cleaning_of_json", "did_cleaning_help", "what_was_made"]


@dataclass(frozen=True, kw_only=True)
class Cleaning:
    """The record of `poprisk clean`, and what a run on the cleaned pairs found."""

    epochs: Sequence[int]  # of each fold
    final: str  # what became the model: "mean", "retrain" or "none"
    num_pairs: int
    dropped: frozenset[str]  # rows, as text
    swapped: frozenset[str]
    expected_wrong: float | None  # share among the pairs that are kept
    noise: Mapping[str, Any]  # estimated from the margins of the folds
    noise_after: Mapping[str, Any]  # of a run on the cleaned pairs; empty without one
    groups: Mapping[str, Sequence[Mapping[str, Any]]]

    @property
    def kept(self) -> int:
        """Pairs of the cleaned data."""
        return self.num_pairs - len(self.dropped)


def cleaning_of_json(content: Any, noise_after: Mapping[str, Any]) -> Cleaning:
    """ValueError where it is no such record."""
    try:
        return Cleaning(
            epochs=[int(epochs) for epochs in content["epochs"]],
            final=str(content["final"]),
            num_pairs=int(content["num_pairs"]),
            dropped=frozenset(map(str, content["dropped"])),
            swapped=frozenset(map(str, content["swapped"])),
            expected_wrong=number(content["expected_wrong"]),
            noise=dict(content["noise"]),
            noise_after=noise_after,
            groups={
                str(kind): [
                    {**group, "group": str(group["group"])}
                    | {name: float(group[name]) for name in ("mean", "low", "high")}
                    | {name: int(group[name]) for name in ("pairs", "suspects")}
                    for group in groups
                ]
                for kind, groups in content.get("groups", {}).items()  # none in older records
                if kind in ("annotator", "length")
            },
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError("no record of `poprisk clean`") from error


def what_was_made(cleaning: Cleaning) -> str:
    """How the pairs were judged, and what became the model."""
    folds = f"{len(cleaning.epochs)} models judged the pairs that they had not seen"
    if cleaning.final == "none":
        return f"{folds}; no model was made."
    if cleaning.final == "retrain":
        return f"{folds}; the model was trained anew on the {cleaning.kept} pairs that were kept."
    *first, last = map(str, cleaning.epochs)
    return f"{folds}; the model is their mean, after {', '.join(first)} and {last} epochs."


def did_cleaning_help(run: Run) -> str:
    """What is left out, and how many wrong labels are expected to be left."""
    cleaning = run.cleaning
    assert cleaning is not None
    if cleaning.dropped or cleaning.swapped:
        text = f"The cleaned data have {cleaning.kept} of {cleaning.num_pairs} pairs"
        text += f", {len(cleaning.swapped)} with exchanged labels" * bool(cleaning.swapped)
        before, after = _expected_before(run), cleaning.expected_wrong
        if before is not None and after is not None:
            text += f": {after:.0%} of the labels are expected to be wrong, before {before:.0%}"
    elif number(cleaning.noise.get("rate")) is None:
        text = "No pair is left out, since the margins do not tell how many labels are wrong"
    else:
        text = "All pairs are kept, since no label is more probably wrong than right"
    unknown = "Whether the model is better these files cannot tell."
    return f"{text}." if cleaning.final == "none" else f"{text}. {unknown}"


def before_and_after(run: Run) -> list[list[str]]:
    """Rows of a table: name, before and after cleaning."""
    cleaning, suspects = run.cleaning, run.suspects
    assert cleaning is not None
    rows = [["pairs", str(cleaning.num_pairs), str(cleaning.kept)]]
    if cleaning.swapped:
        rows.append(["labels exchanged", "0", str(len(cleaning.swapped))])
    before, after = _expected_before(run), cleaning.expected_wrong
    if before is not None and after is not None:
        rows.append(["labels expected to be wrong", f"{before:.1%}", f"{after:.1%}"])
    if suspects is not None and suspects.num_swapped is not None:
        pairs = suspects.pairs
        found, wrong = pairs["row"], pairs["swapped"]
        gone = wrong & found.isin([*cleaning.dropped, *cleaning.swapped])
        spoiled = ~wrong & found.isin([*cleaning.swapped])
        left = suspects.num_swapped - int(gone.sum()) + int(spoiled.sum())
        rows.append(["labels swapped on purpose", str(suspects.num_swapped), str(left)])
    if cleaning.noise_after:
        rates = [number(noise.get("rate")) for noise in (cleaning.noise, cleaning.noise_after)]
        told = ["not told" if rate is None else f"{rate:.1%}" for rate in rates]
        rows.append(["estimated noise rate", *told])
    return rows


def _expected_before(run: Run) -> float | None:
    suspects = run.suspects
    if suspects is None or not suspects.calibrated or suspects.pairs.empty:
        return None
    return float(suspects.pairs["probability_wrong"].mean())

"""What to do next about wrong labels, in words: the one place where it is said."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["LabelAdvice", "label_advice"]

Kind = Literal["not_judged", "not_told", "none_suspect", "suspect"]

_CLEAN = "poprisk clean --config recipe.yaml"


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelAdvice:
    """One of four states, and what to do in it.

    Attributes:
        kind: "not_judged" (no pair has a probability), "not_told" (the margins do not tell how many
            labels are wrong), "none_suspect" or "suspect".
        text: Without its full stop.
    """

    kind: Kind
    text: str

    def __str__(self) -> str:
        """The text."""
        return self.text


def label_advice(
    *, num_judged: int, num_suspect: int, calibrated: bool, command: str, cleaned: bool = False
) -> LabelAdvice:
    """Say what a flip report asks for.

    Args:
        num_judged: Pairs that have a probability.
        num_suspect: Those whose label is more probably wrong than right.
        calibrated: False where the noise rate could not be told, so that probabilities are a
            ranking alone.
        command: What cleans the data, up to where it says which file to write:
            "poprisk flips RUN_DIR --dataset DATA".
        cleaned: Whether `poprisk clean` has been run on the pairs, and is not to be recommended.

    Example:
        >>> found = label_advice(
        ...     num_judged=500, num_suspect=0, calibrated=True, command="poprisk flips out"
        ... )
        >>> found.kind
        'none_suspect'
        >>> print(found)
        nothing: no label is more probably wrong than right
    """
    if not num_judged:
        return LabelAdvice(
            kind="not_judged",
            text="train longer: no pair has a margin from after the model had begun to learn and "
            "before the pair was trained on, so nothing is known of the labels",
        )
    if not calibrated:
        more = (
            f"Margins of a longer training tell more, and those out of fold: `{_CLEAN}` takes "
            "them, and makes the mean of these models the model. "
        )
        return LabelAdvice(
            kind="not_told",
            text="look at the top of the ranking by hand: the margins do not tell how many labels "
            f"are wrong, so P(wrong) is an order and no probability. {'' if cleaned else more}"
            "Some hundred pairs labelled twice tell the rate (double_annotation_rate). "
            f"`{command} --write cleaned.jsonl --min-probability P` leaves out its top even so",
        )
    if not num_suspect:
        return LabelAdvice(
            kind="none_suspect", text="nothing: no label is more probably wrong than right"
        )
    labels = "1 label that is" if num_suspect == 1 else f"{num_suspect} labels that are"
    if cleaned:
        return LabelAdvice(
            kind="suspect",
            text=f"look at the {labels} more probably wrong than right, and correct in your data "
            "those that are wrong; there is nothing to clean again. Errors for a reason that "
            "models learn too (longer answers win) stay hidden, and only pairs that were labelled "
            "with care tell whether the model is better",
        )
    return LabelAdvice(
        kind="suspect",
        text=f"look at the most suspect pairs; to leave out the {labels} more probably wrong than "
        f"right: `{command} --write cleaned.jsonl`. For a better model: `{_CLEAN}` judges each "
        "pair by models that never saw it, and makes the mean of these models the model; "
        "errors for a reason that models learn too (longer answers win) stay hidden",
    )

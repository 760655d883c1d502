"""The rows of the demo's table, and which differences between them are more than noise."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from poprisk_integrations.cli.demo.metrics import paired_difference

__all__ = ["Arm", "Comparison", "best_arm", "compare", "find_arm"]

_STANDARD_ERRORS = 2.0


@dataclass(frozen=True, slots=True)
class Arm:
    """One row: an optimizer at a learning rate, to the end or to the stop.

    Attributes:
        optimizer: "AdamW" or "PopRiskAdamW".
        stop: Whether the stop was allowed to end the run.
        learning_rate: Constant over the run.
        steps: Optimizer steps done.
        stopped: Whether the stop did end the run.
        accuracy: Share of the clean held-out pairs ranked correctly.
        accuracy_se: Standard error of it over pairs.
        swapped_fitted: Share of swapped training pairs ranked as their wrong label says.
        clean_fitted: Share of clean training pairs ranked as labelled.
        drift: Mean absolute reward over the held-out continuations.
        peak_accuracy: Highest accuracy measured on the way, with labels that nobody has.
        peak_step: Where.
        finding: What the windows said at the stop, in words; "" where it did not end the run.
    """

    optimizer: str
    stop: bool
    learning_rate: float
    steps: int
    stopped: bool
    accuracy: float
    accuracy_se: float
    swapped_fitted: float
    clean_fitted: float
    drift: float
    peak_accuracy: float
    peak_step: int
    finding: str = ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Accuracy of one arm minus that of another on the same held-out pairs.

    Attributes:
        difference: In accuracy, first minus second.
        standard_error: Of the difference, paired over held-out pairs.
    """

    difference: float
    standard_error: float

    @property
    def verdict(self) -> str:
        """One of "ahead", "behind" and "level" (within two standard errors)."""
        if abs(self.difference) <= _STANDARD_ERRORS * self.standard_error:
            return "level"
        return "ahead" if self.difference > 0 else "behind"


def compare(first: Tensor, second: Tensor) -> Comparison:
    """Compare two arms by their ranking scores of the held-out pairs.

    Args:
        first: Scores of the one, shape (n,).
        second: Scores of the other, shape (n,).
    """
    return Comparison(*paired_difference(first, second))


def find_arm(arms: Sequence[Arm], optimizer: str, learning_rate: float, *, stop: bool) -> Arm:
    """The row of that name."""
    return next(
        arm
        for arm in arms
        if (arm.optimizer, arm.learning_rate, arm.stop) == (optimizer, learning_rate, stop)
    )


def best_arm(arms: Sequence[Arm], optimizer: str) -> Arm:
    """The most accurate row without the stop; among equals that with the least drift.

    It is chosen on the held-out pairs, so its accuracy flatters it a little.
    """
    rows = [arm for arm in arms if arm.optimizer == optimizer and not arm.stop]
    return max(rows, key=lambda arm: (arm.accuracy, -arm.drift))

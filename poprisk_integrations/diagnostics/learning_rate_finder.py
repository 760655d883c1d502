"""The search for a learning rate, whatever framework runs the short trainings."""

import json
import math
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from poprisk_integrations._files import write_whole
from poprisk_integrations.core.learning_rate_search import (
    horizon_factor,
    indistinguishable_rates,
    parabola_minimum,
    search_rates,
)
from poprisk_integrations.diagnostics.rate_probe import RateProbe

__all__ = ["FinderOptions", "LearningRateSuggestion", "RateCandidate", "find_learning_rate"]

FEWEST_STEPS = 20  # in fewer the score says how fast a rate leaves the start, and little else
FEWEST_SCORES = 8
_FAR = 100  # a run this many times longer than the probe is beyond what its factor was fitted to


@dataclass(frozen=True, kw_only=True, slots=True)
class FinderOptions:
    """How to search.

    Args:
        steps: Optimizer steps that train with each rate, >= 20; fewer where an epoch is short.
        score_batches: Optimizer steps' worth of batches after them, on which the rate is scored
            without training, >= 8.
        start: First rate to try, > 0; None for what suits the optimizer.
        factor: Ratio of neighbouring rates, > 1.
        candidates: Most rates to try, >= 3.

    Raises:
        ValueError: If a value is outside its range.
    """

    steps: int = 100
    score_batches: int = 16
    start: float | None = None
    factor: float = 4.0
    candidates: int = 8

    def __post_init__(self) -> None:
        checks = (
            ("steps", self.steps >= FEWEST_STEPS, f">= {FEWEST_STEPS}"),
            ("score_batches", self.score_batches >= FEWEST_SCORES, f">= {FEWEST_SCORES}"),
            ("start", self.start is None or self.start > 0, "> 0"),
            ("factor", self.factor > 1, "> 1"),
            ("candidates", self.candidates >= 3, ">= 3"),
        )
        for name, ok, allowed in checks:
            value = getattr(self, name)
            if not ok or not math.isfinite(value or 1.0):
                raise ValueError(f"Invalid {name}: {value}. Must be finite and {allowed}.")

    def sizes(self, epoch_steps: int | None) -> tuple[int, int]:
        """Steps that train and batches that score, all of them in one first pass over the data.

        A batch seen twice would be scored by what the model remembers of it, and the largest rate
        that memorises would win.

        Example:
            >>> FinderOptions().sizes(None), FinderOptions().sizes(60), FinderOptions().sizes(30)
            ((100, 16), (44, 16), (20, 10))
        """
        if epoch_steps is None or epoch_steps >= self.steps + self.score_batches:
            return self.steps, self.score_batches
        if epoch_steps < FEWEST_STEPS + FEWEST_SCORES:
            raise ValueError(
                f"One pass over the data has {epoch_steps} optimizer steps, and a search needs "
                f"{FEWEST_STEPS + FEWEST_SCORES}: {FEWEST_STEPS} to train and {FEWEST_SCORES} with "
                "fresh batches to score. Use smaller batches, or less accumulation."
            )
        steps = max(FEWEST_STEPS, epoch_steps - self.score_batches)
        return steps, epoch_steps - steps


@dataclass(frozen=True, kw_only=True, slots=True)
class RateCandidate:
    """One rate that was tried: mean loss of its fresh batches, None if its training failed."""

    rate: float
    loss: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class LearningRateSuggestion:
    """A learning rate, how sure it is, and what it was found from.

    Attributes:
        suggested: Peak learning rate for the run, of the group with the largest one.
        low: Smallest rate that the search cannot tell from the best, for this run.
        high: The largest one.
        candidates: What was tried, by rate.
        steps: Optimizer steps that trained with each rate.
        score_batches: Batches, of an optimizer step each, that scored it.
        total_steps: Length of the run; None if it was not known.
        horizon_factor: What the best rate of the search was multiplied by for this length.
        notes: What to keep in mind, a sentence each.
    """

    suggested: float
    low: float
    high: float
    candidates: tuple[RateCandidate, ...]
    steps: int
    score_batches: int
    total_steps: int | None
    horizon_factor: float
    notes: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        """The suggestion and its range."""
        return (
            f"learning rate {self.suggested:.1e}; from {self.low:.1e} to {self.high:.1e} the "
            f"search sees no difference ({len(self.candidates)} rates, {self.steps} steps each)."
        )

    def __str__(self) -> str:
        return " ".join((self.sentence, *self.notes))

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, lists and text."""
        return asdict(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON."""
        with write_whole(path) as temporary:
            temporary.write_text(json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n")

    def plot(self, ax: Any) -> None:
        """Draw losses over rates, the range and the suggestion.

        Args:
            ax: Axes of matplotlib to draw into, e.g. `plt.gca()`.
        """
        length = f" for {self.total_steps:,} steps" if self.total_steps else ""
        tried = [(c.rate, c.loss) for c in self.candidates if c.loss is not None]
        ax.plot(*zip(*tried, strict=True), "o-", color="#0072b2", label="loss on fresh batches")
        top = max(loss for _, loss in tried)
        failed = [c.rate for c in self.candidates if c.loss is None]
        if failed:
            ax.plot(failed, [top] * len(failed), "x", color="#d55e00", label="training failed")
        ax.axvspan(self.low, self.high, color="#009e73", alpha=0.15, label="no difference seen")
        ax.axvline(
            self.suggested, color="#009e73", label=f"suggested{length}: {self.suggested:.1e}"
        )
        ax.set(xscale="log", xlabel="peak learning rate", ylabel=f"loss after {self.steps} steps")
        ax.legend(frameon=False)


def find_learning_rate(
    train: Callable[[RateProbe], None],
    options: FinderOptions,
    *,
    optimizer: Any = None,
    epoch_steps: int | None,
    total_steps: int | None,
    bar: Callable[..., AbstractContextManager[Any]] | None = None,
) -> LearningRateSuggestion:
    """Search for the rate whose short training leaves the smallest loss on fresh batches.

    Args:
        train: Trains as the probe says, from the same weights, on the same batches, with the same
            random numbers for each probe, and leaves no trace.
        options: How to search.
        optimizer: The run's, or its class: SGD wants rates of another size. None if unknown.
        epoch_steps: Optimizer steps of one pass over the data; None if unknown.
        total_steps: Those of the run that the rate is for; None if unknown.
        bar: A progress bar such as `tqdm`; None for none.

    Returns:
        The suggestion, the same on all ranks.

    Raises:
        ValueError: If an epoch is too short, the loss is not finite at the start, or no rate
            trains.
    """
    steps, score_batches = options.sizes(epoch_steps)
    untrained = math.nan

    def evaluate(rate: float) -> Sequence[float]:
        nonlocal untrained
        probe = RateProbe(rate, steps, score_batches)
        if bar is None:
            train(probe)
        else:
            length = steps + score_batches
            with bar(total=length, desc=f"learning rate {rate:.1e}", leave=False) as shown:
                probe.on_step = shown.update
                train(probe)
        losses = probe.losses()
        untrained = losses[0]  # before the first step, so the same for each rate
        if not math.isfinite(untrained):
            raise ValueError(f"The loss is {untrained} before any step: no rate can help.")
        if not probe.is_over:
            raise ValueError(
                f"The data ended after {len(losses)} of {steps + score_batches} optimizer steps of "
                "a search. Give fewer steps, or more data."
            )
        return losses[steps:]

    scores = search_rates(
        evaluate,
        start=options.start or _usual_start(optimizer),
        factor=options.factor,
        candidates=options.candidates,
    )
    means = {rate: fmean(scores[rate]) for rate in sorted(scores)}
    if not any(map(math.isfinite, means.values())):
        raise ValueError(
            f"The loss became infinite or NaN with every rate from {min(means):.1e} to "
            f"{max(means):.1e}. Give a smaller start."
        )
    factor = horizon_factor(steps, total_steps)
    like_the_best = indistinguishable_rates(scores)
    half_way = math.sqrt(options.factor)
    return LearningRateSuggestion(
        suggested=parabola_minimum(means, untrained) * factor,
        low=like_the_best[0] / half_way * factor,
        high=like_the_best[-1] * half_way * factor,
        candidates=tuple(
            RateCandidate(rate=rate, loss=mean if math.isfinite(mean) else None)
            for rate, mean in means.items()
        ),
        steps=steps,
        score_batches=score_batches,
        total_steps=total_steps,
        horizon_factor=factor,
        notes=(
            *_notes(options, means, steps, total_steps),
            *_experience(optimizer, epoch_steps, total_steps),
        ),
    )


def _usual_start(optimizer: Any) -> float:
    """For optimizers that divide by the gradient's size 1e-3, for those that do not 3e-2."""
    return 3e-2 if _is_a("SGD", optimizer) else 1e-3


def _is_a(name: str, optimizer: Any) -> bool:
    kind = optimizer if isinstance(optimizer, type) else type(optimizer)
    return any(cls.__name__ == name for cls in kind.__mro__)


def _notes(
    options: FinderOptions, means: dict[float, float], steps: int, total_steps: int | None
) -> list[str]:
    notes = []
    best = min((rate for rate in means if math.isfinite(means[rate])), key=means.__getitem__)
    if best in (min(means), max(means)):
        notes.append(
            f"The best rate lies at the edge of the {len(means)} tried: perhaps a better one lies "
            "beyond."
        )
    if steps < options.steps:
        notes.append(
            f"An epoch is short, so each rate had {steps} steps instead of {options.steps}."
        )
    if total_steps is None:
        notes.append("The length of the run is not known; half of the best rate is suggested.")
    elif total_steps > _FAR * steps:
        notes.append(
            f"The run is {total_steps // steps} times as long as a training of this search: give "
            "it more steps if you can."
        )
    return notes


def _experience(optimizer: Any, epoch_steps: int | None, total_steps: int | None) -> list[str]:
    """How far to trust a suggestion, from `recipes/benchmarks/learning_rate`."""
    notes = [
        "In its benchmark the suggestion lay within a factor of 4 of the tuned rate in seven "
        "searches of ten."
    ]
    if epoch_steps is not None and total_steps is not None and total_steps > epoch_steps:
        notes.append(
            "A search sees one pass over the data: where further passes memorised, it was 3 to 5 "
            "times too high."
        )
    if _is_a("PopRiskAdamW", optimizer):
        notes.append("Coming from AdamW: the tuned rate was 1.7 times AdamW's (1.0 to 1.9).")
    return notes

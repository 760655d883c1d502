"""One progress bar for the whole job."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from transformers import TrainerCallback

__all__ = ["JobProgress", "StepProgress", "job_progress"]


class JobProgress:
    """Phases of known relative cost on one bar.

    Args:
        weights: Phase name -> share of the job's time, in any unit.
        report: Called with the phase's name and the fraction of the whole job that is done.
    """

    def __init__(
        self, weights: dict[str, float], report: Callable[[str, float], None] | None = None
    ) -> None:
        self._weights = weights
        self._report = report
        self._done = 0.0
        self._phase: str | None = None

    def start(self, phase: str) -> None:
        """Finish the phase before, if any, and begin this one."""
        if self._phase is not None:
            self._done += self._weights[self._phase]
        self._phase = phase
        self.update(0.0)

    def update(self, fraction: float) -> None:
        """Report how much of the present phase is done, from 0 to 1."""
        assert self._phase is not None
        if self._report is not None:
            done = self._done + fraction * self._weights[self._phase]
            self._report(self._phase, done / sum(self._weights.values()))


class StepProgress(TrainerCallback):
    """Passes the optimizer steps of a Trainer on.

    Args:
        on_step: Called with the number of steps done.
    """

    def __init__(self, on_step: Callable[[int], None] | None) -> None:
        self._on_step = on_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the step."""
        if self._on_step is not None:
            self._on_step(state.global_step)


@contextmanager
def job_progress(
    weights: dict[str, float], console: Console, *, quiet: bool
) -> Iterator[JobProgress]:
    """A bar on a terminal, one line per phase elsewhere, nothing if quiet.

    Args:
        weights: Phase name -> relative cost.
        console: Where to show it.
        quiet: Show nothing.
    """
    if quiet:
        yield JobProgress(weights)
        return
    if not console.is_terminal:
        seen: list[str] = []

        def say(phase: str, done: float) -> None:
            if phase not in seen:
                seen.append(phase)
                console.print(f"[{100 * done:3.0f} %] {phase}", markup=False, highlight=False)

        yield JobProgress(weights, say)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task: TaskID = bar.add_task("starting", total=1.0)
        width = max(map(len, weights))
        yield JobProgress(
            weights,
            lambda phase, done: bar.update(task, description=phase.ljust(width), completed=done),
        )

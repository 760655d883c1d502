"""One progress bar for the whole job."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import TrainerCallback

__all__ = ["JobProgress", "StepProgress"]


class JobProgress:
    """Phases of known relative cost, and the `seconds` that each took.

    A bar on a terminal while it is `shown`, one line per phase elsewhere, nothing without console.
    """

    def __init__(self, weights: dict[str, float], console: Console | None) -> None:
        self.seconds: dict[str, float] = {}
        self._weights = weights
        self._begin = 0.0
        has_terminal = console is not None and console.is_terminal
        self._lines = None if has_terminal else console
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f} %"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not has_terminal,
        )
        self._task = self.bar.add_task("starting", total=sum(weights.values()))
        self._phase = ""

    def shown(self) -> AbstractContextManager[Any]:
        """Show the bar, where there is a terminal."""
        # A bar that is disabled ends with an empty line in rich < 13.4.
        return nullcontext() if self.bar.disable else self.bar

    def start(self, phase: str) -> None:
        """Finish the phase before, if any, and begin this one."""
        self.finish()
        self._phase, self._begin = phase, time.perf_counter()
        self.update(0.0)
        if self._lines is not None:
            share = self.bar.tasks[0].percentage
            self._lines.print(f"[{share:3.0f} %] {phase}", markup=False, highlight=False)

    def update(self, fraction: float) -> None:
        """Show how much of the present phase is done, from 0 to 1."""
        done = sum(self._weights[phase] for phase in self.seconds)
        done += fraction * self._weights[self._phase]
        name = self._phase.ljust(max(map(len, self._weights)))
        self.bar.update(self._task, description=name, completed=done)

    def finish(self) -> None:
        """End the present phase, if any."""
        if self._phase:
            self.seconds[self._phase] = round(time.perf_counter() - self._begin, 2)
        self._phase = ""


class StepProgress(TrainerCallback):
    """Tells after each step how many a Trainer has done."""

    def __init__(self, on_step: Callable[[int], None]) -> None:
        self._on_step = on_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the step."""
        self._on_step(state.global_step)

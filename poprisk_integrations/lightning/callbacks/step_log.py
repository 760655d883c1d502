"""When a callback's present values go to Lightning, and when straight to the user's loggers."""

import math
from collections.abc import Callable, Mapping

from poprisk_integrations.lightning._upstream import (
    LightningModule,
    Trainer,
    is_logger_step,
)

__all__ = ["StepLog"]


class StepLog:
    """Logs values that rarely change, and no decision too late.

    Lightning's `log` takes a tenth of a millisecond and more per value, as much as a whole window
    step. It keeps a value for other callbacks from then on, and for loggers until the epoch
    ends. So it is called when a value is new and, where there are loggers, on the steps that
    Lightning hands to them (every `log_every_n_steps`) if the epoch is another or a value has
    drifted. Between those, a decision is written to the loggers directly.

    A value that does not exist yet is not logged: no number could stand for it without looking
    like a measurement. One that ceases to exist (an onset that is forgotten) is logged as NaN.
    """

    def __init__(self) -> None:
        self._epoch: int | None = None
        self._values: Mapping[str, float] = {}
        self._names: dict[str, float] = {}  # all that were logged so far, each with NaN

    def write(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        step: int,
        values: Callable[[], Mapping[str, float]],
        *,
        is_new: bool,
        is_decision: bool,
    ) -> None:
        """Log after an optimizer step, in `on_train_batch_end`.

        Args:
            trainer: Training.
            pl_module: Its module.
            step: Optimizer steps so far.
            values: Gives the present values.
            is_new: Whether something was measured at this step.
            is_decision: Whether something was decided at this step.
        """
        if trainer.barebones:
            return
        is_logged_now = bool(trainer.loggers) and is_logger_step(trainer)
        is_due = is_new or is_decision
        if not is_due and not is_logged_now:
            return
        present = values()
        if is_due or self._epoch != trainer.current_epoch or present != self._values:
            self._epoch, self._values = trainer.current_epoch, present
            pl_module.log_dict(self._line(present), on_step=True, on_epoch=False, batch_size=1)
        if is_decision and not is_logged_now:
            self.write_now(trainer, step, present)

    def write_now(self, trainer: Trainer, step: int, values: Mapping[str, float]) -> None:
        """Write one line to every logger, of the step that has just ended."""
        for logger in trainer.loggers:
            line = {**self._line(values), "epoch": trainer.current_epoch}
            logger.log_metrics(line, step=step - 1)  # Lightning counts lines from 0

    def _line(self, values: Mapping[str, float]) -> dict[str, float]:
        self._names |= dict.fromkeys(values, math.nan)
        return {**self._names, **values}

"""The criterion "risk" within a run: what its windows decide, what becomes of it, what is said."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from poprisk_integrations.core.diagnosis import diagnose
from poprisk_integrations.core.risk_stopping import RiskDecision, RiskStopping
from poprisk_integrations.diagnostics.cooldown import Cooldown
from poprisk_integrations.diagnostics.risk_run import RiskRun
from poprisk_integrations.diagnostics.schedule_outlook import ScheduleOutlook
from poprisk_integrations.diagnostics.stop_options import StopOptions

__all__ = ["COOLDOWN_END", "RiskStop", "best_is_lost"]

COOLDOWN_END = "the cooldown is over: the learning rate has come to zero, and the run ends"
_THEN = {
    "stop": "stops the run when it rises for good",
    "cooldown": "goes back to its minimum and anneals the learning rate to zero when it rises for "
    "good",
    "monitor": "changes nothing else",
}
_METRICS = {"accuracy": "test accuracy", "reward_accuracy": "held-out reward accuracy"}


class RiskStop:
    """Asks `core.RiskStopping` at the end of windows, and remembers what became of it.

    An adapter calls `start` once loader and optimizer are known, `before_step` before each
    optimizer step, `batch_done` after each batch instead of the run's own, and `accept` and `end`
    where a stop is not to wait. Until it is accepted, the next window may take it back.
    """

    def __init__(self, options: StopOptions) -> None:
        self.options = options
        self.run: RiskRun | None = None  # before `start`
        self.action = options.action or "cooldown"  # what is done in this run
        # Optimizer steps: of the stop that was accepted, of the best window so far, of the start
        # of a cooldown.
        self.stop_step: int | None = None
        self.best_step: int | None = None
        self.cooldown_step: int | None = None
        self.reason = "no window is complete yet"  # of the rule's last decision
        self.is_new_best = False  # whether the last batch ended the best window so far
        self._rule: RiskStopping | None = None  # from `start` on
        self._schedule: ScheduleOutlook | None = None  # same
        self._cooldown: Cooldown | None = None  # once it has begun
        self._is_due = False
        self._tail: int | None = None  # optimizer steps of a cooldown, by the rule
        self._saved: Mapping[str, Any] | None = None  # of a checkpoint, until `start`

    @property
    def history(self) -> list[dict[str, Any]]:
        """One row per window."""
        if self.run is not None:
            return self.run.experiment.history
        return list(self._saved["run"]["experiment"]["history"]) if self._saved else []

    @property
    def is_loaded(self) -> bool:
        """Whether a state waits to be continued by `start`."""
        return self._saved is not None

    def metrics(self) -> dict[str, float]:
        """The last window's estimates under the names that are logged."""
        return {} if self.run is None else self.run.experiment.metrics()

    def choose_action(self, *, holds_weights: bool) -> None:
        """Before the start; ValueError for a cooldown where there can be none.

        Under DeepSpeed the optimizer holds weights of its own beside the model's: then no run can
        go back to its best weights before its end.
        """
        if self.options.action is None:
            self.action = "stop" if holds_weights else "cooldown"
        elif self.action == "cooldown" and holds_weights:
            raise ValueError(
                "Invalid action: 'cooldown'. Under DeepSpeed the best weights, from which it "
                "starts, cannot be loaded in the middle of a run. Use 'stop'."
            )

    @property
    def wants_best(self) -> bool:
        """Whether the weights of the best window may be needed."""
        is_end = self.action == "stop" and self.options.restore == "best"
        return is_end or self.action == "cooldown"

    def start(self, run: RiskRun, epoch_steps: int | None, schedule: ScheduleOutlook) -> None:
        """Begin to judge a run, and continue from a state that was loaded before.

        `epoch_steps` are those of one pass over the data, `schedule` says what the learning rate
        will do; a state of other data is a ValueError.
        """
        self._rule = RiskStopping(
            self.options.risk_config(), epoch_steps=epoch_steps, windows=run.experiment.windows
        )
        self._schedule = schedule
        saved, self._saved = self._saved, None
        if saved is not None:
            self._continue(run, saved["run"])
        self.run = run

    def before_step(self, optimizers: Iterable[Any], schedulers: Iterable[Any]) -> None:
        """In a cooldown, set the learning rates of the step to come."""
        if self._cooldown is not None:
            self._cooldown.before_step(optimizers, schedulers)

    def batch_done(self, number: int, step: int) -> RiskDecision | None:
        """After a batch's optimizer step; the rule's decision where a window ends. Collective."""
        self.is_new_best = False
        row = None if self.run is None else self.run.batch_done(number, step)
        if row is None or self._rule is None or self._schedule is None:
            return None
        decision = self._rule.update(row, schedule=self._schedule.at(step))
        if self.stop_step is None:
            self.is_new_best = decision.is_best
            self.best_step = step if decision.is_best else self.best_step
            self.reason, self._is_due = decision.reason, decision.stop
            self._tail = decision.cooldown_steps
        return decision

    def accept(self, step: int) -> bool:
        """Make a stop final; whether there was one."""
        if not self._is_due or self.stop_step is not None:
            return False
        self.stop_step = step
        return True

    def judge_anew(self) -> None:
        """Forget that a stop was accepted."""
        self.stop_step = None

    def end(self, step: int, left: float, go_back: Callable[[], bool]) -> str:
        """Anneal, if that was asked for; the decision and what becomes of it, in a line.

        `left` are the optimizer steps still planned; `go_back` puts the best weights in, and says
        whether there are any.
        """
        if self.action == "monitor":
            return f"{self.reason}; would have stopped here"
        if self.action == "stop" or left <= 0 or self.run is None:
            return f"{self.reason}; stops here"
        back = "goes back to those weights and " if go_back() else ""
        self.cooldown_step = step
        tail = int(max(1, min(self._tail or 1, left)))
        self._cooldown = Cooldown(tail)
        self.run.release()
        return f"{self.reason}; {back}anneals over {tail} steps"

    @property
    def cooldown_is_over(self) -> bool:
        """Whether the last step of a cooldown has begun."""
        return self._cooldown is not None and self._cooldown.is_over

    def keeps_best(self) -> bool:
        """At the end: whether the best window's weights are better than the last ones."""
        if self.cooldown_step is not None or self._rule is None:
            return False
        return self.stop_step is not None or self._rule.keeps_best()

    def start_line(self, epoch_steps: int) -> str:
        """What can be done in this run, in words that need no paper."""
        assert self.run is not None
        experiment = self.run.experiment
        epochs, per_epoch = experiment.epochs, experiment.windows_per_epoch
        part = ""
        if self.run.tap.part is not None:
            part = (
                "; only of a part of the loss, the one that torch's loss functions make "
                "({:.3g} of {:.3g} in a first batch)".format(*self.run.tap.part)
            )
        if epochs is not None and epochs <= 1:
            return (
                "estimates the test loss without validation data: in a single pass over the data "
                "no example is seen twice, so the training loss before each step is one; there is "
                f"nothing to stop{part}"
            )
        count = "" if epochs is None else f", {max(1, round(epochs * per_epoch))} in all"
        return (
            f"estimates the test loss without validation data: a random "
            f"{100 * experiment.first_share:.3g} % of the {experiment.examples:,} examples join "
            "late, until then they are only measured; an estimate every "
            f"{max(1, round(epoch_steps / per_epoch))} steps{count}; {_THEN[self.action]}{part}"
        )

    def end_line(self) -> str:
        """The last estimate and the smallest one, each with its standard error."""
        return _estimates(self.history)

    def report(self) -> dict[str, Any]:
        """The part of `poprisk_stop.json` that is alike in all frameworks."""
        setup: dict[str, Any] = {}
        if self.run is not None:  # what two runs must share to be compared
            experiment = self.run.experiment
            setup = {name: getattr(experiment, name) for name in ("examples", "share", "epochs")}
        return {
            "criterion": "risk",
            "stop_step": self.stop_step,
            "best_step": self.best_step,
            "cooldown_step": self.cooldown_step,
            "reason": self.reason,
            "diagnosis": str(diagnose(self.history)),
            "setup": setup,
            "history": [dict(row) for row in self.history],
        }

    def state_dict(self) -> dict[str, Any] | None:
        """Tensors, numbers, strings and None; None before the start. Every rank must call."""
        if self.run is None:
            return dict(self._saved) if self._saved else None
        self.run.experiment.join()
        parts = {"schedule": self._schedule, "rule": self._rule, "cooldown": self._cooldown}
        states = {name: None if part is None else part.state_dict() for name, part in parts.items()}
        return {
            "run": {"experiment": self.run.experiment.state_dict(), **states},
            "stop_step": self.stop_step,
            "best_step": self.best_step,
            "cooldown_step": self.cooldown_step,
            "cooldown_steps": self._tail,
            "reason": self.reason,
            "is_due": self._is_due,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue, now or from `start` on; a state of other data is a ValueError."""
        if self.run is None:
            self._saved = state
        else:
            self._continue(self.run, state["run"])
        self.stop_step, self.best_step = state["stop_step"], state["best_step"]
        self.cooldown_step, self.reason = state["cooldown_step"], state["reason"]
        # What an older version for Trainer did not write is not needed there.
        self._tail, self._is_due = state.get("cooldown_steps"), state.get("is_due", False)

    def _continue(self, run: RiskRun, state: Mapping[str, Any]) -> None:
        run.experiment.load_state_dict(state["experiment"])
        if self._schedule is not None and state["schedule"] is not None:
            self._schedule.load_state_dict(state["schedule"])
        if self._rule is not None and state["rule"] is not None:
            self._rule.load_state_dict(state["rule"])
        if state["cooldown"] is not None:
            self._cooldown = Cooldown.from_state(state["cooldown"])
            run.release()


def best_is_lost(step: int) -> str:
    """After a resume without the copy of the best weights, which each process kept in memory."""
    return (
        f"the weights of the best window so far, step {step}, are not in the checkpoint: until a "
        "window is better, this run cannot go back to them"
    )


def _estimates(history: Sequence[Mapping[str, Any]]) -> str:
    """The last estimate and the smallest one.

    Example:
        >>> row = {"step": 9, "train_loss": 1.8, "estimated_test_loss": 2.25,
        ...        "estimated_test_loss_se": 0.021}
        >>> _estimates([{**row, "step": 6, "estimated_test_loss": 2.2}, row])
        'estimated test loss 2.25 +- 0.02 at step 9 (training loss 1.80); smallest 2.20 +- 0.02 at \
step 6'
        >>> _estimates([])
        'no estimate: no window with enough measured losses is complete'
    """
    rows = [row for row in history if row.get("estimated_test_loss") is not None]
    if not rows:
        return "no estimate: no window with enough measured losses is complete"
    last, best = rows[-1], min(rows, key=lambda row: float(row["estimated_test_loss"]))
    line = f"estimated test loss {_value(last, 'estimated_test_loss')} at step {last['step']}"
    line += f" (training loss {float(last['train_loss']):.2f})"
    if best is not last:
        line += f"; smallest {_value(best, 'estimated_test_loss')} at step {best['step']}"
    for metric, name in _METRICS.items():
        if last.get(f"estimated_test_{metric}") is not None:
            line += f"; estimated {name} {_value(last, f'estimated_test_{metric}')}"
            if last.get(f"train_{metric}") is not None:
                line += f" (trained on: {float(last[f'train_{metric}']):.2f})"
    return line


def _value(row: Mapping[str, Any], name: str) -> str:
    error = row.get(f"{name}_se")
    digits = 2 if error is None or error >= 0.005 else 3
    text = f"{float(row[name]):.{digits}f}"
    return text if error is None else f"{text} +- {float(error):.{digits}f}"

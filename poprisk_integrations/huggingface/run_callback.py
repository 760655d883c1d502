"""How our callbacks follow a run of Trainer: hooks, checkpoints, log lines, words to a person."""

import logging
import sys
from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from poprisk_integrations.diagnostics.guard import Guarded, guarded
from poprisk_integrations.huggingface.run_facts import Moment, checkpoint_directory, place_in_run

__all__ = [
    "MetricsCallback",
    "ResumableCallback",
    "RunCallback",
    "Voice",
    "add_metrics",
    "for_the_console",
    "log_now",
]

logger = logging.getLogger(__name__)

# The most telling first: a console line shows three.
_ON_THE_CONSOLE = (
    "estimated_test_loss",
    "estimated_test_accuracy",
    "estimated_gap",
    "signal_ratio",
    "predicted_stop_step",
    "noise_rate",
    "reward_accuracy",
    "open_fraction",
    "lr_cuts",
)


class MetricsCallback(TrainerCallback):
    """A callback with numbers for Trainer's log lines.

    Trackers are called before users' callbacks, so numbers added in `on_log` would not reach
    them: `registration.register` has them added before the first callback is called.
    """

    def metrics(self) -> dict[str, float]:
        """The present values."""
        raise NotImplementedError


class Voice:
    """A callback in one run: what it says to a person, and how its files are called.

    `place` counts the callbacks of its kind in this run; what the first one writes has no number.
    """

    def __init__(self, name: str, state: TrainerState) -> None:
        self.name, self.place = name, place_in_run(state, name)
        self._speaks = state.is_world_process_zero
        self._topics: set[str] = set()

    @property
    def prefix(self) -> str:
        """Of the names of its numbers."""
        return "poprisk/" if self.place == 1 else f"poprisk/{self.place}/"

    def file(self, stem: str) -> str:
        """Name of a file in its checkpoints."""
        return f"{stem}{'' if self.place == 1 else f'_{self.place}'}.safetensors"

    def say(self, line: str) -> None:
        """Print a line that anybody should read."""
        if self._speaks:
            tqdm.write(f"poprisk: {line}", file=sys.stderr)  # leaves progress bars whole

    def warn(self, line: str, topic: str = "") -> None:
        """Log a warning; the first one only of those that have a topic."""
        if self._speaks and topic not in self._topics:
            logger.warning("%s: %s", self.name, line)
        if topic:
            self._topics.add(topic)


def _handed_on(hook: str, moment: str, *, may_begin: bool = False) -> Any:
    """A hook of Trainer that calls the method of this name of the part, if it has one.

    With `may_begin`, the first such hook of a callback that was added to a run which had begun is
    its `on_train_begin`.
    """

    def call(
        self: "RunCallback",
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        now = Moment.of(args, state, control, kwargs)
        if may_begin and not self._has_begun:
            self._begin(now, is_late=True)
        elif hasattr(self._part, moment):
            getattr(self._part, moment)(now)

    call.__name__ = call.__qualname__ = hook  # as errors call it
    return guarded(call)


class RunCallback(Guarded, MetricsCallback):
    """Hands Trainer's hooks on to the part that works in the run at hand.

    Subclasses make it in `_join`: it has `metrics`, `close`, and of the methods named below those
    that it needs, which take a `Moment`. Between runs there is none, and so nothing of a trainer
    that would be copied or pickled with the callback.
    """

    _part: Any = None
    _has_begun = False
    _voice: Voice

    on_epoch_begin = _handed_on("on_epoch_begin", "epoch_begins", may_begin=True)
    on_step_begin = _handed_on("on_step_begin", "step_begins", may_begin=True)
    on_substep_end = _handed_on("on_substep_end", "substep_ends")
    # Gradients are complete, and clipped; the scheduler has not changed their learning rate yet.
    on_pre_optimizer_step = _handed_on("on_pre_optimizer_step", "before_optimizer_step")
    on_optimizer_step = _handed_on("on_optimizer_step", "after_optimizer_step")
    on_step_end = _handed_on("on_step_end", "step_ends", may_begin=True)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the settings, then start afresh or continue from the checkpoint."""
        self._begin(Moment.of(args, state, control, kwargs), is_late=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go of the run."""
        self._close()
        self._has_begun = False

    @guarded
    def metrics(self) -> dict[str, float]:
        """The present values of all that this callback logs. Every rank must call."""
        return {} if self._part is None else dict(self._part.metrics())

    def switch_off(self, where: str, error: Exception) -> None:
        """Do nothing from here on, and let go of the run."""
        self._close()
        super().switch_off(where, error)

    def _join(self, now: Moment, *, is_late: bool) -> None:
        """Make `_part`, if there is something to do. What cannot work is a ValueError."""
        raise NotImplementedError

    def _begin(self, now: Moment, *, is_late: bool) -> None:
        self._close()  # of an attempt that failed
        self._has_begun, self.switched_off = True, None
        self._voice = Voice(type(self).__name__, now.state)
        self._join(now, is_late=is_late)

    def _close(self) -> None:
        part, self._part = self._part, None
        if part is not None:
            part.close()


class ResumableCallback(RunCallback, ExportableState):
    """A callback whose numbers are in Trainer's checkpoints: JSON with Trainer's own, and a file.

    Its part has `rule_state`, `progress_state`, `resume` from what both were, and `saved`, which
    writes `file`; `without_file` says what a run does that resumes without.
    """

    def _begin_afresh(self) -> None:
        """Everything that a run leaves behind is as it was made."""
        self._rule_state: dict[str, Any] = {}  # of the last run
        self._progress_state: dict[str, Any] = {}

    @property
    def rule_state(self) -> dict[str, Any]:
        """What the rule remembers."""
        return self._rule_state if self._part is None else dict(self._part.rule_state)

    @rule_state.setter
    def rule_state(self, value: dict[str, Any]) -> None:
        self._rule_state = value

    @property
    def progress_state(self) -> dict[str, Any]:
        """What else is remembered, in plain numbers."""
        return self._progress_state if self._part is None else dict(self._part.progress_state)

    @progress_state.setter
    def progress_state(self, value: dict[str, Any]) -> None:
        self._progress_state = value

    def state(self) -> dict[str, Any]:
        """Arguments and numbers for `trainer_state.json`."""
        return {"args": self._arguments(), "attributes": self._numbers() or {}}

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put what JSON cannot hold beside Trainer's files."""
        exported: dict[str, Any] = state.stateful_callbacks  # type: ignore[assignment]
        if isinstance(exported.get(type(self).__name__), list):
            exported[type(self).__name__] = []  # of two of a class Trainer adds to what is there
        if self._part is None:
            return
        try:
            self._part.saved(Moment.of(args, state, control, kwargs))
        except Exception as error:  # a full disk, in whichever words; the model is saved
            self._voice.warn(
                f"{self._part.file} could not be written ({error}): a run that resumes from this "
                f"checkpoint {self._part.without_file}.",
                topic="unsaved",
            )

    def _arguments(self) -> dict[str, Any]:
        """The user's, by which a callback is known in a checkpoint."""
        raise NotImplementedError

    @guarded
    def _numbers(self) -> dict[str, Any]:
        return {"rule_state": self.rule_state, "progress_state": self.progress_state}

    def _begin(self, now: Moment, *, is_late: bool) -> None:
        self._close()
        self._begin_afresh()  # what an earlier run of this callback has left is not of this one
        super()._begin(now, is_late=is_late)
        exported: dict[str, Any] = now.state.stateful_callbacks  # type: ignore[assignment]
        if now.state.global_step > 0 and self._part is not None:
            try:
                self._part.resume(now, self._saved(exported))
            except (LookupError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"The state of {self._voice.name} in the checkpoint's trainer_state.json "
                    f"({checkpoint_directory(now.state)!r}) is damaged: {error!r}. Resume from "
                    "another one."
                ) from error
        # Trainer's next save fails for a callback that the checkpoint does not know.
        exported.setdefault(type(self).__name__, self.state())

    def _saved(self, exported: dict[str, Any]) -> dict[str, Any] | None:
        """Its attributes in the checkpoint; of several callbacks, of one with its arguments.

        Trainer itself restores them only with `restore_callback_states_from_checkpoint=True`.
        """
        entry = exported.get(type(self).__name__) or []
        entries = entry if isinstance(entry, list) else [entry]
        same = [e for e in entries if e["args"] == self._arguments()] or entries
        return same[-1]["attributes"] if same else None

    def _close(self) -> None:
        if self._part is not None:
            self._rule_state, self._progress_state = self.rule_state, self.progress_state
        super()._close()


def add_metrics(
    callbacks: Iterable[TrainerCallback], logs: dict[str, Any] | None, state: TrainerState
) -> None:
    """Put the numbers of our callbacks into a training log line and `state.log_history`.

    Lines of an evaluation stay as they are.
    """
    if logs is None or not ("loss" in logs or "train_loss" in logs):
        return
    metrics: dict[str, float] = {}
    for callback in callbacks:
        if isinstance(callback, MetricsCallback):
            metrics.update(callback.metrics() or {})  # None from one that was switched off
    logs.update(metrics)
    if state.log_history and state.log_history[-1].get("step") == state.global_step:
        state.log_history[-1].update(metrics)


def for_the_console(logs: dict[str, Any] | None) -> dict[str, Any] | None:
    """A line for people: a copy with at most three of our numbers.

    Example:
        >>> for_the_console({"loss": 0.3, "poprisk/signal_ratio": 1.5, "poprisk/agreement_se": 0.1})
        {'loss': 0.3, 'poprisk/signal_ratio': 1.5}
    """
    if logs is None or not any(str(key).startswith("poprisk/") for key in logs):
        return logs
    from poprisk_integrations.core.noise_rate import WIDEST  # of DPO only

    low, high = (logs.get(f"poprisk/noise_rate_{end}", 0.0) for end in ("low", "high"))
    hidden = "noise_rate" if high - low > WIDEST else ""  # a rate that the margins do not tell
    names = [name for name in _ON_THE_CONSOLE if name != hidden and f"poprisk/{name}" in logs]
    shown = [f"poprisk/{name}" for name in names[:3]]
    return {k: v for k, v in logs.items() if k in shown or not str(k).startswith("poprisk/")}


def log_now(now: Moment) -> None:
    """Have Trainer log at the end of this step, unless the user switched logging off."""
    strategy = now.args.logging_strategy
    if str(getattr(strategy, "value", strategy)) != "no":
        now.control.should_log = True

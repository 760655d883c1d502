"""The criterion "signal" within a fit: windows of gradients, a rule, the schedule's say."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from poprisk_integrations.diagnostics.cooldown import Cooldown, signal_tail
from poprisk_integrations.diagnostics.gradient_reader import GradientReader
from poprisk_integrations.diagnostics.guard import guarded
from poprisk_integrations.diagnostics.run_length import setup_changes
from poprisk_integrations.diagnostics.stop_judge import StopJudge
from poprisk_integrations.lightning._upstream import (
    LightningModule,
    Trainer,
    rank_zero_info,
    run_steps,
    schedule_outlook,
)
from poprisk_integrations.lightning.callbacks.window_callback import WindowCallback

if TYPE_CHECKING:
    from poprisk_integrations.lightning.callbacks.early_stopping import PopRiskEarlyStopping

__all__ = ["SignalCallback"]


class SignalCallback(WindowCallback):
    """Reads windows of gradients for the callback that Lightning knows, and asks its rule."""

    _name = "PopRiskEarlyStopping"

    def __init__(self, owner: "PopRiskEarlyStopping") -> None:
        options = owner.options
        self._owner, self._config = owner, options.signal_config()
        self.window, self.accumulator = options.window, options.accumulator
        self.epoch_steps = options.epoch_steps
        self.action = (options.action or "stop") if options.asks_for_signal else "monitor"
        self._reset()
        self._judge = StopJudge(self._config)
        self._why = ""  # the test loss cannot be estimated, where it was asked for
        self._cooldown: Cooldown | None = None

    @property
    def stop_step(self) -> int | None:
        """Optimizer step of the decision."""
        return self._judge.state.stop_step

    @property
    def onset_step(self) -> int | None:
        """Optimizer step of the onset; None if there is none."""
        return self._judge.state.onset_step

    @property
    def reason(self) -> str:
        """The last change of mind, and what the windows say."""
        return self._judge.reason

    @property
    def history(self) -> list[dict[str, Any]]:
        """One row per window."""
        return self._judge.history

    @property
    def cooldown_is_over(self) -> bool:
        """Whether the last step of a cooldown has begun."""
        return self._cooldown is not None and self._cooldown.is_over

    def begin(self, trainer: Trainer, pl_module: LightningModule, why: str) -> None:
        """Before training; `why` is the reason for not using "risk", if that was asked for."""
        self._begin(trainer, pl_module)
        self._why = why
        self._judge.schedule = schedule_outlook(trainer)
        if setup_changes(self._setup, self._settings()):
            self._judge.judge_anew(self._setup["kappa"])

    def _settings(self) -> dict[str, Any]:
        names = ("kappa", "threshold", "min_steps")
        return {name: getattr(self._config, name) for name in names}

    def _before_first_batch(self, trainer: Trainer, reader: GradientReader) -> None:
        line = self._judge.start_line(run_steps(trainer), reader.plan)
        if self._why:
            line = (
                f"the test loss cannot be estimated in this run: {self._why}. It measures whether "
                "batches still agree, and stops nothing (criterion='signal' would)"
            )
        rank_zero_info(f"{self._name}: {line}")

    def _after_step(
        self, trainer: Trainer, pl_module: LightningModule, reader: GradientReader
    ) -> None:
        onset, is_full = self.onset_step, reader.window.is_full
        decision = self._judge.after_step(
            self._step,
            reader.take_lr(),
            reader.close(self._step) if is_full else None,
            reused=reader.reused,
            device=trainer.strategy.root_device,
        )
        self._owner.conclude(
            trainer,
            pl_module,
            is_new=is_full,
            is_onset=decision.onset,
            is_decision=onset != self.onset_step,
        )

    def metrics(self) -> dict[str, float]:
        """The present values of all that is logged, without what does not exist yet."""
        lr = 0.0 if self._reader is None else self._reader.lr
        found = self._judge.metrics(self._step, lr)
        return {f"poprisk/{name}": value for name, value in found.items()}

    @guarded
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Take in this step's gradients; set the learning rate of a cooldown."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self._cooldown is not None:
            schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
            self._cooldown.before_step([optimizer], schedulers)

    def accept(self, step: int) -> bool:
        """Make a stop final, unless the schedule makes it wait; whether there was one."""
        return self._judge.accept(step)

    def judge_anew(self) -> None:
        """Forget that a stop was accepted."""
        self._judge.judge_anew()

    def end(self, step: int, left: float, go_back: Callable[[], bool]) -> str:
        """Anneal, if that was asked for; what is done, in a line."""
        if self.action == "cooldown":
            self._cooldown = Cooldown(signal_tail(step, left))
        done = {"stop": "", "cooldown": "anneals from here on: ", "monitor": "would have "}
        return f"{done[self.action]}{self.reason}"

    def report(self) -> dict[str, Any]:
        """Its part of `poprisk_stop.json`."""
        return self._judge.report(self._setup)

    def state_dict(self) -> dict[str, Any]:
        """Its part of the callback's state."""
        cooldown = None if self._cooldown is None else self._cooldown.state_dict()
        return {**self._judge.state_dict(), **self._reader_state(), "cooldown": cooldown}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore; windows follow when training starts."""
        self._judge.load_state_dict(state_dict)
        self._load_reader_state(state_dict)
        if state_dict.get("cooldown") is not None:
            self._cooldown = Cooldown.from_state(state_dict["cooldown"])

    def switch_off(self, where: str, error: Exception) -> None:
        """Let go of the window, and have the callback say so."""
        self._reader = None
        self._owner.switch_off(where, error)
        self.switched_off = self._owner.switched_off

"""The criterion "signal" within a run: windows in, a verdict that may have to wait out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from poprisk_integrations.core.diagnosis import Diagnosis, diagnose
from poprisk_integrations.core.learning_rate_cut import LearningRateCutConfig, LearningRateCutRule
from poprisk_integrations.core.stopping import (
    StoppingConfig,
    StoppingDecision,
    StoppingRule,
    StoppingState,
)
from poprisk_integrations.core.window import WindowRatio
from poprisk_integrations.diagnostics.learning_rate_scaling import (
    CutWatch,
    cut_factor,
    largest_lr,
    scale_learning_rates,
)
from poprisk_integrations.diagnostics.run_length import RunPlan, stop_outlook
from poprisk_integrations.diagnostics.schedule_outlook import ScheduleOutlook
from poprisk_integrations.distributed import mean_over_ranks, world_size

__all__ = ["RateCut", "StopJudge"]

_MEASURES = tuple(
    name + end for name in ("signal_ratio", "risk_decrease", "agreement") for end in ("", "_se")
)


class StopJudge:
    """Feeds `core.StoppingRule` with steps, and keeps what every window said.

    The rule never takes a verdict back. But a run may have to go on for a while, since its schedule
    still warms up or decays or its trainer has a least number of epochs, and the signal may return
    meanwhile: until `accept` is called, a verdict is judged anew at every step.
    """

    def __init__(self, config: StoppingConfig) -> None:
        self._rule = StoppingRule(config)
        self._verdict: StoppingState | None = None  # due, but not accepted
        self.history: list[dict[str, Any]] = []  # one row per window
        self.schedule: ScheduleOutlook | None = None  # None if that is not known

    @property
    def state(self) -> StoppingState:
        """What the rule remembers."""
        return self._rule.state

    @property
    def diagnosis(self) -> Diagnosis:
        """What the windows so far say, and how surely."""
        threshold = self._rule.config.threshold
        return diagnose(self.history, since=self.state.onset_step, threshold=threshold)

    @property
    def reason(self) -> str:
        """The last change of mind, and what the windows say."""
        return f"{self.state.reason}; {self.diagnosis}" if self.history else self.state.reason

    def start_line(self, run_steps: int | None, plan: RunPlan) -> str:
        """What the stop can do in this run."""
        line = stop_outlook(run_steps, plan.epoch_steps, plan.window).line(
            unknown_because=plan.unknown_because, min_steps=self._rule.config.min_steps
        )
        schedule = self.schedule
        if "cannot" in line or schedule is None:
            return line
        if schedule.at(schedule.peak_step).still_decays:
            line += "; no stop while the learning rate still decays below half of what it is"
        return line

    def must_wait(self, step: int) -> bool:
        """Whether the schedule does not let the run end here."""
        return self.schedule is not None and self.schedule.at(step).must_finish

    def after_step(
        self,
        step: int,
        lr: float,
        closed: WindowRatio | None = None,
        *,
        reused: bool = True,
        device: Any = None,
    ) -> StoppingDecision:
        """Account for an optimizer step, and for the window that closed with it, if one did.

        `lr` is 0 for a step that was skipped; `reused` says whether the window's examples had been
        trained on before. Every rank must call, with the device of their communication.
        """
        # Ranks count alike: a schedule that is fed with numbers of one rank only would let their
        # training times drift apart, and after an onset any step may be the last.
        if world_size() > 1 and (closed is not None or self.state.onset_step is not None):
            sums = torch.tensor([self.state.lr_sum, lr], dtype=torch.float64, device=device)
            lr_sum, lr = mean_over_ranks(sums).tolist()
            self._rule.state = replace(self.state, lr_sum=lr_sum)
        before = self.state
        if closed is None:
            decision = self._rule.update(step=step, lr=lr)
        else:
            decision = self._rule.update(
                step=step,
                lr=lr,
                ratio=closed.ratio,
                ratio_se=closed.ratio_se,
                noise=float(closed.noise.sum()),
                reused=reused,
            )
            self.history.append(_row(step, self.state.lr_sum, closed, reused=reused))
        self._verdict = None
        if decision.stop and before.stop_step is None:
            self._verdict = self.state
            self._rule.state = replace(self.state, stop_step=None, reason=before.reason)
        return decision

    def accept(self, step: int) -> bool:
        """Make a verdict final, unless the schedule makes it wait; whether there was one."""
        if self._verdict is None or self.must_wait(step):
            return False
        self._rule.state, self._verdict = self._verdict, None
        return True

    def judge_anew(self, kappa_before: float | None = None) -> None:
        """Forget a stop, but not the onset, which a run with another kappa may have seen."""
        kappa = self.state.onset_kappa
        if kappa is not None and kappa_before is not None:
            kappa *= self._rule.config.kappa / kappa_before
        self._rule.state = replace(self.state, stop_step=None, onset_kappa=kappa)

    def metrics(self, step: int, lr: float) -> dict[str, float]:
        """The present values of all that is logged, without what does not exist yet."""
        last = self.history[-1] if self.history else {}
        values = {name: last.get(name) for name in _MEASURES}
        values["onset_step"] = self.state.onset_step
        if not self.must_wait(step):
            values["predicted_stop_step"] = self._rule.predicted_stop_step(step, lr)
        return {name: float(v) for name, v in values.items() if v is not None}

    def report(self, setup: Mapping[str, Any]) -> dict[str, Any]:
        """Its part of `poprisk_stop.json`."""
        return {
            "criterion": "signal",
            **self._rule.state_dict(),
            "diagnosis": str(self.diagnosis),
            "window_steps": setup.get("window_steps"),
            "setup": dict(setup),
            "history": self.history,
        }

    def state_dict(self) -> dict[str, Any]:
        """Numbers, strings and None."""
        history = [dict(row) for row in self.history]
        diagnosis = str(self.diagnosis) if history else ""
        return {"rule": self._rule.state_dict(), "history": history, "diagnosis": diagnosis}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore; an older state may have no history."""
        self._rule.load_state_dict(state_dict["rule"])
        self.history = [dict(row) for row in state_dict.get("history", ())]


def _row(step: int, lr_sum: float, window: WindowRatio, *, reused: bool) -> dict[str, Any]:
    """A window that closed at a step, ready for JSON; None for what was not measured.

    `lr_sum` is the training time at its end.
    """
    row: dict[str, Any] = {
        "step": step,
        "lr_sum": lr_sum,
        "signal_ratio": window.ratio,
        "signal_ratio_se": window.ratio_se,
        **{name: getattr(window, name) for name in _MEASURES[2:]},
        "noise": float(window.noise.sum()),
    }
    finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
    return {**finite, "steps": window.steps, "reused": reused}


class RateCut:
    """Asks `core.LearningRateCutRule` at the end of each window, and cuts, down to `min_lr`."""

    def __init__(self, config: LearningRateCutConfig, min_lr: float) -> None:
        if not (math.isfinite(min_lr) and min_lr >= 0):
            raise ValueError(f"Invalid min_lr: {min_lr!r}. Must be finite and >= 0.")
        self.rule = LearningRateCutRule(config)
        self.min_lr = min_lr
        self._watch = CutWatch()

    def after_step(
        self,
        step: int,
        lr: float,
        closed: WindowRatio | None,
        optimizers: Sequence[Any],
        schedulers: Sequence[Any],
    ) -> tuple[str, bool]:
        """A warning that a scheduler has undone a cut, or "", and whether a cut was made.

        `lr` is the largest of the step that was taken, `closed` the window that closed with it.
        """
        warning = self._watch.look(lr)
        factor = cut_factor(optimizers, self.rule.config.factor, self.min_lr)
        if closed is None or factor == 1.0:
            return warning, False
        is_cut = self.rule.update(
            step=step,
            risk_decrease=closed.risk_decrease,
            risk_decrease_se=closed.risk_decrease_se,
            agreement=closed.agreement,
            agreement_se=closed.agreement_se,
        )
        if is_cut:
            before = max(map(largest_lr, optimizers))
            scale_learning_rates(optimizers, schedulers, factor)
            self._watch.cut(before, factor * before)
        return warning, is_cut

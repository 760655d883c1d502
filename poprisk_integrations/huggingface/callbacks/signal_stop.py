"""The criterion "signal" for a Trainer: windows of gradients, a rule, the schedule's say."""

from typing import Any

from poprisk_integrations.core.window import WindowRatio
from poprisk_integrations.diagnostics.cooldown import Cooldown, signal_tail
from poprisk_integrations.diagnostics.gate_monitor import GateSampler, gate_metrics
from poprisk_integrations.diagnostics.stop_judge import StopJudge
from poprisk_integrations.diagnostics.stop_options import StopOptions
from poprisk_integrations.huggingface.callbacks.windows import Windows
from poprisk_integrations.huggingface.checkpoints import forget_best, keep_best_path, mark_best
from poprisk_integrations.huggingface.run_callback import Voice, log_now
from poprisk_integrations.huggingface.run_facts import Moment

__all__ = ["TrainerSignal"]


class TrainerSignal(Windows):
    """Ends training at `kappa` times the moment when gradients stopped carrying signal.

    F compares the summed gradient of a window of optimizer steps with the noise of its steps
    (`core.window`); when it falls below `threshold` on data that have been seen before, batches
    no longer agree on where to go. `core.StoppingRule` decides, never while the learning rate still
    rises, nor while it still decays below half of what it is.

    Gradients are read right before the optimizer step, averaged over micro-batches and ranks.
    Clipping weighs the steps of a window against each other; with transformers >= 5.3, and under
    DeepSpeed, it is undone. The share of clipped steps is logged as `poprisk/clipped_fraction`.
    Uneven batches (a short last accumulation window, `num_items_in_batch` token counts) leave F
    unbiased: with independent g_t of one mean mu and any variances
        E |sum_t g_t|^2 = T^2 |mu|^2 + sum_t Var(g_t),    E[T S] = sum_t Var(g_t)
    Training time is the sum of learning rates (of groups with different ones the largest: a
    common factor cancels). A step that the fp16 grad scaler skipped counts for nothing.

    `why` is the reason why the estimate of the test loss could not be had, so that nothing is
    ended; "" where F was asked for.
    """

    def __init__(self, options: StopOptions, now: Moment, voice: Voice, why: str) -> None:
        self.action = "monitor" if why else options.action or "stop"
        self._restore, self._why = options.restore, why
        self._judge = StopJudge(options.signal_config())
        self._judge.schedule = now.schedule_outlook()
        super().__init__(options, now, voice)
        self._gate = GateSampler(now.optimizer)
        self._optimizer, self._device = now.optimizer, now.args.device
        self._step = now.state.global_step

    @property
    def history(self) -> list[dict[str, Any]]:
        """One row per window."""
        return self._judge.history

    @property
    def stop_step(self) -> int | None:
        """Optimizer step of the decision."""
        return self._judge.state.stop_step

    @property
    def rule_state(self) -> dict[str, Any]:
        """What the rule remembers."""
        state: dict[str, Any] = self._judge.state_dict()["rule"]
        return state

    def metrics(self) -> dict[str, float]:
        """The present values of all that is logged. Every rank calls it."""
        values = self._judge.metrics(self._step, self.reader.lr)
        if self.reader.clipping.fraction is not None:
            values["clipped_fraction"] = self.reader.clipping.fraction
        known = {f"{self._voice.prefix}{name}": value for name, value in values.items()}
        return {**known, **gate_metrics(self._optimizer, self._device)}

    def say_what_can_be_done(self, now: Moment) -> None:
        """One line at the start."""
        line = self._judge.start_line(now.state.max_steps, self.reader.plan)
        if self._why:
            line = (
                f"the test loss cannot be estimated ({self._why}), so this run is only watched "
                f"(criterion='signal' would stop it by its gradients); {line}"
            )
        if "cannot stop" in line or "cannot tell" in line:
            self._voice.warn(f"{line}.")
        else:
            self._voice.say(line)

    def end_line(self) -> str:
        """What the windows say at the end."""
        return self._judge.reason

    def report(self) -> dict[str, Any]:
        """Its part of `poprisk_stop.json`."""
        clipping = self.reader.clipping
        shares = {"clipped_fraction": clipping.fraction, "clipping": clipping.verdict()}
        return {**self._judge.report(self.reader.setup), **shares}

    def step_begins(self, now: Moment) -> None:
        """Sample the gate at the last step of a window; anneal."""
        cooldown = self._cooldown(now)
        if cooldown is not None:
            cooldown.before_step([now.optimizer], [now.scheduler])
        if self.reader.window.seen == self.reader.plan.window - 1:
            self._gate.before_step()

    def saved(self, now: Moment) -> None:
        """Put the window beside Trainer's files."""
        if self.action != "monitor":
            keep_best_path(now)
        super().saved(now)

    def close(self) -> None:
        """Let go of the optimizer, also of a gate that a failed attempt has left sampling."""
        self._gate.after_step()
        super().close()

    def _continue(self, rule_state: dict[str, Any], history: list[dict[str, Any]]) -> None:
        if rule_state:
            self._judge.load_state_dict({"rule": rule_state})
        self._judge.history = [dict(row) for row in history]

    def _cooldown(self, now: Moment) -> Cooldown | None:
        """A quarter as long as the run was up to the stop; None outside of it."""
        stop = self.stop_step
        if self.action != "cooldown" or stop is None:
            return None
        tail = signal_tail(stop, now.state.max_steps - stop)
        return Cooldown(tail, now.state.global_step - stop)

    def _after_step(self, now: Moment, window: WindowRatio | None) -> None:
        self._gate.after_step()
        self._step, had_onset = now.state.global_step, self._judge.state.onset_step is not None
        decision = self._judge.after_step(
            self._step,
            self.reader.take_lr(),
            window,
            reused=self.reader.reused,
            device=now.args.device,
        )
        stops_now = self._judge.accept(self._step)
        if self.action != "monitor":
            is_forgotten = had_onset and self._judge.state.onset_step is None
            self._act(now, decision.onset, stops_now, is_forgotten)
        if stops_now:
            would = "would have " if self.action == "monitor" else ""
            self._voice.say(f"{would}{self._judge.reason}")

    def _act(self, now: Moment, is_onset: bool, stops_now: bool, is_forgotten: bool) -> None:
        if self._restore == "onset" and is_forgotten:
            forget_best(now)
        cooldown = self._cooldown(now)
        ends = self.stop_step is not None and (cooldown is None or cooldown.is_over)
        ends_now = stops_now if cooldown is None else ends
        is_end = self._restore in ("best", "stop") and ends_now
        if is_end or (self._restore == "onset" and is_onset):
            mark_best(now)
        if is_onset or stops_now or is_forgotten:
            log_now(now)
        if ends:
            now.control.should_training_stop = True

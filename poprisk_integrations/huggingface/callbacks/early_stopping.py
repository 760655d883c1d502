"""The test loss without validation data, and a stop at its minimum, for a Trainer."""

from typing import TYPE_CHECKING, Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from poprisk_integrations.core.diagnosis import Diagnosis, diagnose
from poprisk_integrations.core.stopping import StoppingRule
from poprisk_integrations.diagnostics.guard import guarded
from poprisk_integrations.diagnostics.stop_options import StopArguments
from poprisk_integrations.diagnostics.stop_report import full_row, write_report
from poprisk_integrations.huggingface.callbacks.risk_stop import NotAvailable, TrainerRisk
from poprisk_integrations.huggingface.checkpoints import check_restore
from poprisk_integrations.huggingface.run_callback import ResumableCallback
from poprisk_integrations.huggingface.run_facts import Moment, place_in_run, run_directory

if TYPE_CHECKING:
    from poprisk_integrations.huggingface.callbacks.signal_stop import TrainerSignal

__all__ = ["PopRiskEarlyStoppingCallback"]


class PopRiskEarlyStoppingCallback(ResumableCallback, StopArguments):
    """Estimates the test loss without validation data, and stops the run at its minimum.

    criterion="risk": a random share `sit_out` of the examples makes no gradient for a while; their
    losses are measured all the same, and tell what an example loses that was never trained on
    (`core.risk_curve`). All examples are trained on before the run ends. Any optimizer, no eval
    set, no gradients read; each example is forwarded once per epoch, as before. Needs data with a
    length, an order of examples that shows (`diagnostics.sit_out_refusal`), and losses per example:
    they are read off torch's loss functions, else from the outputs of transformers' heads, else
    from `example_losses`. Of a metric per example (accuracy) the test value is estimated too.

    criterion="signal": F compares the summed gradient of a window of optimizer steps with the noise
    of its steps; the run ends at `kappa` times the moment when F fell below `threshold` on data
    that were seen before (`core.stopping`).

    "auto": "risk" where it can be had. Elsewhere F is measured and logged, and ends nothing; the
    line at the start says why.

    No run is ended while its schedule still warms up, or is still to decay. Where this must stay
    off: grokking and other delayed generalisation, and epoch-wise double descent.

    Logs, at the end of each window and with every line of Trainer, `poprisk/estimated_test_loss`,
    `poprisk/estimated_gap` (test minus training loss), `poprisk/estimated_test_accuracy`, each with
    `_se`; of "signal" `poprisk/signal_ratio` (F), `poprisk/risk_decrease` (C), `poprisk/agreement`
    (U), each with `_se`, `poprisk/onset_step`, `poprisk/predicted_stop_step` and the gate
    statistics; of a second such callback as `poprisk/2/...`. `poprisk_stop.json` in the output
    directory (of a trial) tells at the end why, with one row per window. A resumed run continues as
    if it had never been interrupted.

    Args:
        criterion: "auto", "risk" or "signal".
        sit_out: Share of the examples that sits out at first, in (0, 0.5]. Of "risk".
        patience: Windows without a smaller estimate before the stop, >= 1. Of "risk".
        action: What is done once the smallest estimate lies behind. "cooldown": go back to the
            weights of the best window, and from there anneal the learning rate to zero over a tail
            (at least an epoch), with all examples. "stop": end the run. "monitor": log only
            (examples still sit out at first). None: "cooldown", but "stop" under DeepSpeed, where
            weights cannot be loaded in mid-run, and for "signal".
        restore: Which weights stay where the run is not cooled down: at a stop, and at the planned
            end if the estimate has risen since. "best": those of the smallest estimate (of "signal"
            those of the stop), as the run's best checkpoint where "stop" may save one, once per
            epoch at most, else from memory. "stop": the checkpoint of the stop. "onset": that of
            the onset of "signal"; needs `save_strategy="best", load_best_model_at_end=True`. None:
            the last weights. Where an evaluation metric picks the best checkpoint, none is marked.
        window: Optimizer steps per window of "signal", >= 4, or "auto"
            (`diagnostics.auto_window_steps`).
        kappa: Of "signal": stop at this multiple of the training time of the onset, >= 1.
        threshold: Of "signal": F below this is the onset, > 0. An onset counts once F has exceeded
            1.05 times this; two windows in a row above 1.3 times this take it back.
        min_steps: No stop before this many optimizer steps.
        accumulator: Of "signal": "auto", "exact" or "sample", see `diagnostics.GradientWindow`.
        epoch_steps: Of "signal": optimizer steps of one pass over the data, where the loader does
            not show it (streams, custom samplers, data that repeat inside).
        example_losses: Losses per example of (model, inputs), a tensor of shape (B,), where they
            cannot be found in the forward pass; it costs a second one. Not kept in checkpoints.

    Raises:
        ValueError: If an argument is outside its range; at the start of training if the criterion
            asked for cannot be had, if `restore` does not fit the training arguments, or if another
            callback of this kind stops the run too. `action="monitor"` never raises there.

    Example:
        >>> PopRiskEarlyStoppingCallback(criterion="signal", kappa=3.0).state()["args"]["kappa"]
        3.0
    """

    _part: "TrainerRisk | TrainerSignal | None"

    def _begin_afresh(self) -> None:
        super()._begin_afresh()
        self.criterion_in_use = self.options.criterion
        default = "cooldown" if self.criterion_in_use == "risk" else "stop"
        self.acts_as = self.options.action or default
        self._found: dict[str, Any] = {}  # the last run's report
        self._why = ""  # nothing is ended: why the estimate, or F, could not be had

    @property
    def history(self) -> list[dict[str, Any]]:
        """One dict per window: "step", what was measured, None for the rest of the known names."""
        return [full_row(row) for row in self.progress_state.get("history", [])]

    @property
    def stopping_state(self) -> dict[str, Any]:
        """What the rule in use remembers."""
        if self.criterion_in_use == "risk":
            found = self._found if self._part is None else self._part.report()
            return {name: found.get(name) for name in ("stop_step", "best_step", "reason")}
        return self.rule_state or StoppingRule(self.options.signal_config()).state_dict()

    @property
    def diagnosis(self) -> Diagnosis:
        """What the windows so far say, and how surely."""
        onset, threshold = self.rule_state.get("onset_step"), self.options.threshold
        return diagnose(self.history, since=onset, threshold=threshold)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the report and let go of the run."""
        has_begun = self._has_begun
        self._say_what_was_done()
        super().on_train_end(args, state, control, **kwargs)
        if not has_begun or not state.is_world_process_zero:
            return
        directory = run_directory(args, state)
        try:
            write_report(directory, self._report(state), self._voice.place)
        except Exception as error:  # a full disk, in whichever words; the model comes first
            self._voice.warn(f"no report could be written to {directory!r} ({error}).")

    def _arguments(self) -> dict[str, Any]:
        given = self.options.arguments()
        del given["example_losses"]  # no JSON
        return given

    def _join(self, now: Moment, *, is_late: bool) -> None:
        if self.options.action != "monitor":
            check_restore(self.options.restore, now.args)
            if place_in_run(now.state, f"{self._voice.name} that stops") > 1:
                raise ValueError(
                    f"Invalid action: {self.acts_as!r} in two PopRiskEarlyStoppingCallbacks of one "
                    "run. Give all but one action='monitor'."
                )
        self.criterion_in_use = "signal"
        if not self.options.asks_for_signal:
            self._estimate(now, is_late)
        if self._part is None:
            self._watch_gradients(now)
        self.acts_as = "monitor" if self._part is None else self._part.action

    def _estimate(self, now: Moment, is_late: bool) -> None:
        """Take "risk", where it can be had."""
        try:
            if is_late:
                raise NotAvailable("the callback was added to a run that had begun")
            self._part = TrainerRisk(self.options, now, self._voice, self.switch_off)
        except NotAvailable as error:
            if self.options.criterion == "risk" and self.options.action != "monitor":
                raise ValueError(
                    f"Invalid criterion: 'risk'. The test loss of this run cannot be estimated: "
                    f"{error}. criterion='auto' only watches it, 'signal' stops it by gradients."
                ) from None
            self._why = str(error)
        else:
            self.criterion_in_use = "risk"

    def _watch_gradients(self, now: Moment) -> None:
        # Imported here, for most runs read no gradients.
        from poprisk_integrations.diagnostics.stop_judge import StopJudge
        from poprisk_integrations.huggingface.callbacks.signal_stop import TrainerSignal

        try:
            self._part = TrainerSignal(self.options, now, self._voice, self._why)
        except ValueError as error:
            if self.options.action != "monitor" and not self._why:
                raise
            self._why = self._why or str(error)
            self._found = StopJudge(self.options.signal_config()).report({})  # of no window
            self._voice.warn(f"watches nothing in this run. {error}")

    def _begin(self, now: Moment, *, is_late: bool) -> None:
        super()._begin(now, is_late=is_late)
        if self._part is None:
            return
        self._part.say_what_can_be_done(now)
        if self._part.stop_step is not None and self.acts_as == "stop":
            self._voice.warn(
                f"this run had stopped at step {self._part.stop_step}; Trainer takes one more step "
                "before it can stop again."
            )

    def _close(self) -> None:
        if self._part is not None:
            self._found = self._part.report()
        super()._close()

    @guarded
    def _say_what_was_done(self) -> None:
        if self._part is not None and self._part.stop_step is None:  # else it was said then
            self._voice.say(f"did not stop this run; {self._part.end_line()}")

    def _report(self, state: TrainerState) -> dict[str, Any]:
        return {
            "stopped": self._found.get("stop_step") is not None and self.acts_as != "monitor",
            "global_step": state.global_step,
            **self._found,
            "switched_off": self.switched_off,
            "best_model_checkpoint": state.best_model_checkpoint,
            "settings": self._arguments(),
            "why": self._why or None,
            "history": self.history,
        }

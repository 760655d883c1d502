"""Stops a Trainer without validation data."""

import sys
from dataclasses import replace
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerControl, TrainerState, TrainingArguments

from poprisk_integrations.core import StoppingConfig, StoppingDecision, StoppingRule
from poprisk_integrations.core.diagnosis import Diagnosis, diagnose
from poprisk_integrations.core.window import WindowRatio
from poprisk_integrations.diagnostics.guard import guarded
from poprisk_integrations.diagnostics.stop_outlook import outlook_line, stop_outlook
from poprisk_integrations.distributed import mean_over_ranks
from poprisk_integrations.huggingface.callbacks.best_checkpoint import (
    check_restore,
    forget_best,
    keep_best_path,
    mark_best,
)
from poprisk_integrations.huggingface.callbacks.exported_state import place_in_run
from poprisk_integrations.huggingface.callbacks.gate_metrics import GateSampler, gate_metrics
from poprisk_integrations.huggingface.callbacks.stop_report import write_stop_report
from poprisk_integrations.huggingface.callbacks.window_callback import WindowCallback
from poprisk_integrations.huggingface.log_metrics import log_now
from poprisk_integrations.huggingface.run_facts import batch_size_of, run_directory

__all__ = ["PopRiskEarlyStoppingCallback"]

_ACTIONS = ("stop", "monitor")
_RESTORES = ("stop", "onset", None)


class PopRiskEarlyStoppingCallback(WindowCallback):
    """Ends training at `kappa` times the moment when gradients stopped carrying signal.

    F compares the summed gradient of a window of optimizer steps with the noise of its steps
    (`core.window`); when it falls below `threshold` on data that have been seen before, batches
    no longer agree on where to go. `core.StoppingRule` decides. Any torch optimizer, no eval set;
    single process, DDP, FSDP, and DeepSpeed ZeRO with an Adam (`DeepSpeedGradients`).

    Gradients are read right before the optimizer step, averaged over micro-batches and ranks.
    Clipping weighs the steps of a window against each other; with transformers >= 5.3, and under
    DeepSpeed, it is undone. The share of clipped steps is logged as `poprisk/clipped_fraction`.
    Uneven batches (a short last accumulation window, `num_items_in_batch` token counts) leave F
    unbiased: with independent g_t of one mean mu and any variances
        E |sum_t g_t|^2 = T^2 |mu|^2 + sum_t Var(g_t),    E[T S] = sum_t Var(g_t)
    Training time is the sum of learning rates (of groups with different ones the largest: a
    common factor cancels). A step that the fp16 grad scaler skipped counts for nothing.

    Where it must stay off: grokking and other delayed generalisation, and epoch-wise double
    descent, where memorising comes first. It never stops in a first pass over the data. How long
    that is comes from the data and their sampler, not from Trainer's epochs
    (`diagnostics.data_pass`); of streams, custom samplers and loaders it cannot be known, and they
    count as one pass unless `epoch_steps` says otherwise. A line at the start says what can be
    done in this run, one at the end what was done. Sorted, curriculum or re-weighted data make
    batches that are not exchangeable, which F cannot see.

    Logs `poprisk/signal_ratio` (F of the last window), `poprisk/risk_decrease` (C),
    `poprisk/agreement` (U), each with `_se`, `poprisk/onset_step`,
    `poprisk/predicted_stop_step` (at the present learning rate) and the gate statistics
    in `state.log_history` and all trackers (a console line shows three of them); of a second such
    callback as `poprisk/2/...`. An onset and a stop get a log line of their own. At the end
    `poprisk_stop.json` tells why, with one row per window: in the output directory, in a
    hyper-parameter search in that of the trial. Parameters that freeze or thaw start the window
    afresh. A resumed run continues as if it had never been interrupted (an unfinished window of
    sharded models starts afresh).

    Args:
        kappa: Stop at this multiple of the training time of the onset, >= 1.
        window: Optimizer steps per window, >= 4, or "auto": one epoch, a third of an epoch for
            runs of under eight, a twentieth of the run if the length of an epoch is unknown; at
            least 8 (`diagnostics.auto_window_steps`).
        threshold: F below this is the onset, > 0. An onset counts once F has exceeded 1.05 times
            this; two windows in a row above 1.3 times this take it back.
        min_steps: No stop before this many optimizer steps.
        action: "stop", or "monitor" to log and change nothing.
        restore: The run's best checkpoint. "stop": the one of the stop, saved there unless
            `save_strategy="no"`. "onset": the one of the onset; needs `save_strategy="best",
            load_best_model_at_end=True`. None: neither is saved or marked. Where an evaluation
            metric picks the best checkpoint, "stop" saves without marking.
        accumulator: "auto", "exact" or "sample", see `diagnostics.GradientWindow`.
        epoch_steps: Optimizer steps of one pass over the data, where the loader does not show it
            (streams, custom samplers, data that repeat inside). None: what the loader shows.

    Raises:
        ValueError: If an argument is outside its range; at the start of training if `restore`
            does not fit the training arguments, if another callback of this kind stops the run
            too, or if DeepSpeed runs an optimizer without an Adam's state. `action="monitor"` never
            raises there.

    Example:
        >>> PopRiskEarlyStoppingCallback(kappa=3.0, window=20).state()["args"]["window"]
        20
    """

    def __init__(
        self,
        kappa: float = 2.0,
        window: int | str = "auto",
        threshold: float = 1.0,
        min_steps: int = 0,
        action: str = "stop",
        restore: str | None = "stop",
        *,
        accumulator: str = "auto",
        epoch_steps: int | None = None,
    ) -> None:
        for name, value, allowed in (("action", action, _ACTIONS), ("restore", restore, _RESTORES)):
            if value not in allowed:
                raise ValueError(f"Invalid {name}: {value!r}. Must be one of {allowed}.")
        self.kappa = kappa
        self.threshold = threshold
        self.min_steps = min_steps
        self.action = action
        self.restore = restore
        defaults = StoppingConfig()
        self._config = StoppingConfig(
            kappa=kappa,
            threshold=threshold,
            arm_threshold=defaults.arm_threshold * threshold,
            rearm_threshold=defaults.rearm_threshold * threshold,
            min_steps=min_steps,
        )
        self._rule = StoppingRule(self._config)
        super().__init__(window, accumulator, epoch_steps)
        self._gate: GateSampler | None = None
        self._said_stop = False
        self._step, self._lr = 0, 0.0
        self._optimizer: Any = None
        self._device: Any = None

    @property
    def stopping_state(self) -> dict[str, Any]:
        """What the rule remembers, see `core.StoppingState`."""
        return self.rule_state

    @property
    def diagnosis(self) -> Diagnosis:
        """What the windows so far say, and how surely."""
        since, rows = self._rule.state.onset_step, self.progress.history
        return diagnose(rows, since=since, threshold=self.threshold)

    def state(self) -> dict[str, Any]:
        """Arguments and numbers for `trainer_state.json`."""
        names = ("kappa", "window", "threshold", "min_steps", "action", "restore")
        return self._state(*names, "accumulator", "epoch_steps")

    @guarded
    def metrics(self) -> dict[str, float]:
        """The present values of all that this callback logs."""
        rule, values = self._rule.state, self.progress.last_measures()
        values["onset_step"] = rule.onset_step
        values["predicted_stop_step"] = self._rule.predicted_stop_step(self._step, self._lr)
        if self._reader is not None:
            values["clipped_fraction"] = self._reader.clipping.fraction
        prefix = "poprisk/" if self._place == 1 else f"poprisk/{self._place}/"
        known = {f"{prefix}{name}": v for name, v in values.items() if v is not None}
        return {**known, **gate_metrics(self._optimizer, self._device)}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the settings, then start afresh or continue from the checkpoint."""
        if self.action == "stop":
            check_restore(self.restore, args)
            if place_in_run(state, f"{type(self).__name__} that stops") > 1:
                raise ValueError(
                    "Invalid action: 'stop' in two PopRiskEarlyStoppingCallbacks of one run. Give "
                    "all but one action='monitor'."
                )
        self._said_stop = False
        self._let_go()
        super().on_train_begin(args, state, control, **kwargs)
        if self._reader is None:
            return
        self._optimizer, self._device = kwargs["optimizer"], args.device
        self._gate = GateSampler(self._optimizer)
        self._step, self._lr = state.global_step, self._reader.lr
        if self._rule.state.stop_step is not None and self.action == "stop":
            self._warn(
                state,
                f"this run had stopped at step {self._rule.state.stop_step}; Trainer takes one "
                "more step before it can stop again.",
            )

    @guarded
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sample the gate at the last step of a window."""
        super().on_step_begin(args, state, control, **kwargs)
        if self._reader is None or self._gate is None:
            return
        if self.progress.window_seen == self._reader.window.steps - 1:
            self._gate.before_step()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the window beside Trainer's files."""
        if self.action == "stop":
            keep_best_path(args, state)
        super().on_save(args, state, control, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the report and let go of the optimizer and the window."""
        if state.is_world_process_zero and self._has_begun:
            directory = run_directory(args, state)
            try:
                if not self._said_stop:
                    self._say(f"did not stop this run; {self._verdict()}")
                write_stop_report(directory, self._report(args, state), self._place)
            except Exception as error:  # a full disk, in whichever words; the model comes first
                self._warn(state, f"no report could be written to {directory!r} ({error}).")
        self._let_go()
        super().on_train_end(args, state, control, **kwargs)

    def switch_off(self, where: str, error: Exception) -> None:
        """Do nothing from here on, and let go of the optimizer."""
        self._let_go()
        super().switch_off(where, error)

    @property
    def _may_refuse(self) -> bool:  # type: ignore[override]
        return self.action == "stop"

    def _say_at_start(self, state: TrainerState) -> None:
        plan = self._plan
        outlook = stop_outlook(state.max_steps, plan.epoch_steps, plan.window)
        because = self._passes.found.reason
        line = outlook_line(outlook, unknown_because=because, min_steps=self.min_steps)
        if line.startswith("cannot"):
            self._warn(state, f"{line}.")
        elif state.is_world_process_zero:
            self._say(line)

    def _say(self, line: str) -> None:
        tqdm.write(f"poprisk: {line}", file=sys.stderr)  # leaves progress bars whole

    def _let_go(self) -> None:
        """Also of a gate that a failed attempt has left sampling."""
        if self._gate is not None:
            self._gate.after_step()
        self._optimizer = self._gate = None

    def _report(self, args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
        clipping = None if self._reader is None else self._reader.clipping
        return {
            "stopped": self._rule.state.stop_step is not None and self.action == "stop",
            "global_step": state.global_step,
            **self.stopping_state,
            "diagnosis": str(self.diagnosis),
            "switched_off": self.switched_off,
            "window_steps": self._plan.window,
            "best_model_checkpoint": state.best_model_checkpoint,
            "clipped_fraction": None if clipping is None else clipping.fraction,
            "clipping": None if clipping is None else clipping.verdict(),
            "settings": self.state()["args"],
            "setup": {
                "window_steps": self._plan.window,
                "epoch_steps": self._plan.epoch_steps,
                "accumulator": self.accumulator,
                "world_size": int(args.world_size),
                "batch_size": batch_size_of(args, state),
                "accumulation_steps": self._plan.accumulation,
            },
            "history": self.progress.history,
        }

    def _after_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        window: WindowRatio | None,
        kwargs: dict[str, Any],
    ) -> None:
        assert self._reader is not None
        if self._gate is not None:
            self._gate.after_step()
        self._step = state.global_step
        lr = 0.0 if self._reader.was_skipped() else self._reader.lr
        before = self._rule.state
        # Any step after the onset may be the last: then all ranks must count alike.
        if args.world_size > 1 and (window is not None or before.onset_step is not None):
            sums = torch.tensor([before.lr_sum, lr], dtype=torch.float64, device=args.device)
            lr_sum, lr = mean_over_ranks(sums).tolist()
            before = self._rule.state = replace(before, lr_sum=lr_sum)
        measured = {} if window is None else _measures(window)
        decision = self._rule.update(
            step=state.global_step,
            lr=lr,
            reused=self.progress.window_reused,
            **measured,
        )
        if window is not None:
            self.progress.record(state.global_step, self._rule.state.lr_sum, window)
        self._lr = self._reader.lr
        stops_now = decision.stop and before.stop_step is None
        if self.action == "stop":
            forgotten = before.onset_step is not None and self._rule.state.onset_step is None
            self._act(args, state, control, decision, stops_now=stops_now, forgotten=forgotten)
        if stops_now and state.is_world_process_zero:
            self._said_stop = True
            self._say(f"{'' if self.action == 'stop' else 'would have '}{self._verdict()}")

    def _act(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        decision: StoppingDecision,
        *,
        stops_now: bool,
        forgotten: bool,
    ) -> None:
        if self.restore == "onset" and forgotten:
            forget_best(args, state)
        if (self.restore == "onset" and decision.onset) or (self.restore == "stop" and stops_now):
            mark_best(args, state, control)
        if decision.onset or stops_now or forgotten:
            log_now(args, control)
        if decision.stop:
            control.should_training_stop = True

    def _verdict(self) -> str:
        return f"{self._rule.state.reason}; {self.diagnosis}"


def _measures(window: WindowRatio) -> dict[str, float]:
    return {
        "ratio": window.ratio,
        "ratio_se": window.ratio_se,
        "noise": float(window.noise.sum()),
    }

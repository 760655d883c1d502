"""The criterion "risk" for a Trainer: its batches, its checkpoints, and what its methods do."""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from poprisk_integrations.diagnostics.cooldown import KeptWeights
from poprisk_integrations.diagnostics.data_pass import sit_out_refusal
from poprisk_integrations.diagnostics.output_losses import output_losses
from poprisk_integrations.diagnostics.risk_run import RiskRun
from poprisk_integrations.diagnostics.risk_stop import COOLDOWN_END, RiskStop, best_is_lost
from poprisk_integrations.diagnostics.sitting_out import SittingOut
from poprisk_integrations.diagnostics.stop_options import StopOptions
from poprisk_integrations.distributed import mean_over_ranks, world_size
from poprisk_integrations.huggingface.checkpoints import (
    BestCheckpoint,
    forget_best,
    load_state,
    mark_best,
    save_state,
)
from poprisk_integrations.huggingface.run_callback import Voice, log_now
from poprisk_integrations.huggingface.run_facts import (
    Moment,
    checkpoint_directory,
    checkpoint_path,
    place_in_run,
    trainer_of,
)

__all__ = ["NotAvailable", "TrainerRisk"]


class NotAvailable(Exception):
    """Why the test loss of a run cannot be estimated."""


class TrainerRisk(RiskStop):
    """One run of a Trainer with examples sitting out, from its start to its end.

    Losses per example of visitors are read off `Trainer.compute_loss`, which is replaced on this
    one trainer, whatever class it is of; sitters are run through the same method. A trainer that
    has losses per example of its own shows them by a method `example_values`, which is asked after
    each `compute_loss`.

    `failed` takes an error of ours inside of a training step, which goes on. `NotAvailable` is
    raised on all ranks where it is not available on one.
    """

    run: RiskRun
    without_file = "estimates afresh"

    def __init__(
        self,
        options: StopOptions,
        now: Moment,
        voice: Voice,
        failed: Callable[[str, Exception], Any],
    ) -> None:
        super().__init__(options)
        args, state, trainer, loader = now.args, now.state, trainer_of(now.state), now.loader
        _agree(now, _obstacle(now, trainer))
        self.choose_action(holds_weights=args.deepspeed is not None)
        self._trainer, self._voice, self._failed = trainer, voice, failed
        self.file = voice.file("poprisk_risk")
        self.rule_state: dict[str, Any] = {}  # it is in that file
        accumulation = int(args.gradient_accumulation_steps)
        self._epoch_steps = max(1, -(-len(loader) // accumulation))  # by Trainer's own count
        self._epoch = state.global_step // self._epoch_steps - 1
        self._number = 0  # of the batch
        self._skipped = 0  # batches of the first epoch, in a resumed run
        if not args.ignore_data_skip:
            self._skipped = state.global_step % self._epoch_steps * accumulation
        self._is_expecting = False  # a forward pass of visitors
        self._compute_loss: Callable[..., Any] = trainer.compute_loss
        self._unmeasured = ""  # why visitors' losses could not be read
        run = RiskRun(
            loader,
            trainer.model,
            experiment=SittingOut(
                len(loader.dataset),
                share=options.sit_out,
                seed=args.seed,
                epochs=state.max_steps / self._epoch_steps,
                device=args.device,
            ),
            example_losses=options.example_losses,
        )
        try:
            self.start(run, self._epoch_steps, now.schedule_outlook())
            _agree(now, self._try_out())
        except BaseException:
            run.close()
            raise
        # The best weights: a checkpoint where Trainer can load it at the end, else a copy.
        self._best = BestCheckpoint(args)
        self._saves_best = self.wants_best and self.action == "stop" and self._best.is_possible
        is_copied = self.wants_best and not self._saves_best and args.deepspeed is None
        self._kept = KeptWeights(trainer.model) if is_copied else None
        if self._saves_best:
            self._best.have_it_loaded()
        trainer.compute_loss = self._listening

    @property
    def progress_state(self) -> dict[str, Any]:
        """The history; all else is in a file of its own."""
        return {"window_file": self.file, "history": list(self.history)}

    def metrics(self) -> dict[str, float]:
        """The present values of all that is logged."""
        found = super().metrics().items()
        return {name.replace("poprisk/", self._voice.prefix, 1): value for name, value in found}

    def say_what_can_be_done(self, now: Moment) -> None:
        """One line at the start."""
        self._voice.say(self.start_line(self._epoch_steps))
        if self.options.action is None and self.action == "stop":
            self._voice.warn(
                "under DeepSpeed there is no cooldown from the best weights; action='stop' it is."
            )

    def epoch_begins(self, now: Moment) -> None:
        """Say who sits out of this epoch."""
        self._epoch += 1
        self._number, self._skipped = self._skipped, 0
        self.run.experiment.begin_epoch(self._epoch)

    def step_begins(self, now: Moment) -> None:
        """Measure the sitters that are due; anneal."""
        self.before_step([now.optimizer], [now.scheduler])
        self._before_batch()

    def substep_ends(self, now: Moment) -> None:
        """Measure the sitters that are due between micro-batches."""
        self._batch_ends()
        self._before_batch()

    def step_ends(self, now: Moment) -> None:
        """Close a window that ends here, and let the rule decide."""
        self._batch_ends()
        step, control, restore = now.state.global_step, now.control, self.options.restore
        if self.batch_done(self._number - 1, step) is not None:
            log_now(now)
        if self.is_new_best and self._kept is not None:
            self._kept.keep()
        if self.is_new_best and self._saves_best:
            self._best.keep(now)
        if self.accept(step):
            if self.action == "stop" and restore == "stop":
                mark_best(now)
            line = self.end(step, now.state.max_steps - step, self._go_back)
            self._voice.say(f"{line}; {self.end_line()}")
        if self.cooldown_is_over:
            self._voice.say(COOLDOWN_END)
        if self.cooldown_is_over or (self.stop_step is not None and self.action == "stop"):
            control.should_training_stop = True
        is_end = control.should_training_stop and self.cooldown_step is None
        if is_end and self.action != "monitor" and restore == "best":
            if self.keeps_best():
                self._go_back()
            else:
                forget_best(now)  # the last weights are the ones to keep
        if self._unmeasured:
            line = f"no losses of trained examples: {self._unmeasured}"
            self._voice.warn(line, topic="unmeasured")

    def saved(self, now: Moment) -> None:
        """Put the losses beside Trainer's files; every rank must call."""
        self._best.saved(now)
        kept = {}
        if self._kept is not None and not now.args.fsdp:  # where each rank holds a part of it
            kept = self._kept.state_dict()
        own = {**(self.state_dict() or {}), "best": self._best.state_dict(), "kept": kept}
        if now.args.should_save:
            directory = checkpoint_path(now.args, now.state)
            save_state(own, directory, now.state.global_step, self.file)

    def resume(self, now: Moment, saved: dict[str, Any] | None) -> None:
        """Continue from the file in the checkpoint; without it only old rows are kept."""
        step, directory = now.state.global_step, checkpoint_directory(now.state)
        afresh = "the losses are recorded afresh from here on."
        found = None if directory is None else load_state(directory, step, self.file)
        if found is None:
            self._voice.warn(f"no {self.file} of step {step} in the checkpoint: {afresh}")
            rows = (saved or {}).get("progress_state", {}).get("history", [])
            estimates = [row for row in rows if row.get("estimated_test_loss") is not None]
            self.history.extend(estimates)
            return
        try:
            self.load_state_dict(found)
        except ValueError as error:  # of other data
            self._voice.warn(f"{error} The losses are recorded afresh from here on.")
            return
        self._best.load_state_dict(found["best"])
        if self._kept is None:
            return
        self._kept.load_state_dict(found["kept"])
        is_wanted = self._kept.is_empty and self.cooldown_step is None
        if is_wanted and self.best_step is not None:
            self._voice.warn(f"{best_is_lost(self.best_step)}.")

    def close(self) -> None:
        """Leave the trainer, its loader and its arguments as they were."""
        if vars(self._trainer).get("compute_loss") == self._listening:
            del self._trainer.compute_loss
        self.run.close()
        self._best.close()

    def _go_back(self) -> bool:
        return self._kept is not None and self._kept.load()

    def _try_out(self) -> str:
        """Why losses per example cannot be read in this run; "" if they can."""
        reason = self.run.try_out(self._forward)
        if reason and self._unmeasured:
            reason = f"{reason} In the outputs: {self._unmeasured}."
        self._unmeasured = ""
        return reason

    def _before_batch(self) -> None:
        """Measure the sitters that are due; then the trainer's forward pass is one of visitors."""
        self.run.measure_sitters(self._number, self._forward)
        self._is_expecting = self.run.is_measuring

    def _batch_ends(self) -> None:
        self._is_expecting = False
        self._number += 1

    def _listening(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the trainer's `compute_loss`; its result is the same, to the bit."""
        # Evaluations, and a second call within a step, are nobody's visit.
        if not self._is_expecting or not torch.is_grad_enabled():
            return self._compute_loss(model, inputs, *args, **kwargs)
        self._is_expecting = False
        if hasattr(self._trainer, "example_values"):
            result = self._compute_loss(model, inputs, *args, **kwargs)
            self._visited(self._trainer.example_values)
            return result
        own = self.run.own_values(inputs)
        if own is not None:
            self._visited(lambda: own)
            return self._compute_loss(model, inputs, *args, **kwargs)
        given = dict(inputs) if isinstance(inputs, Mapping) else {}
        rows = len(self.run.handle.indices(self._number))
        with _last_output(model) as output, self.run.tap.recording(rows) as record:
            result = self._compute_loss(model, inputs, *args, **kwargs)
            record.total = result[0] if isinstance(result, tuple) else result
        self._visited(lambda: record.values or self._of_outputs(given, output.get("last"), rows))
        return result

    def _visited(self, values: Callable[[], Mapping[str, Tensor] | None]) -> None:
        try:
            self.run.visited(self._number, values())
        except Exception as error:  # of ours: the training step is none of its business
            if world_size() > 1:
                raise
            self._failed("compute_loss", error)

    def _forward(self, batch: Any) -> "Tensor | Mapping[str, Tensor]":
        """The same of sitters: the model as an evaluation takes it, in training mode."""
        trainer = self._trainer
        before = _records(trainer)  # of which a measurement is to leave nothing
        trainer.model.train()  # as the training step to come does
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of checkpointed layers that make no gradient
            try:
                inputs = trainer._prepare_inputs(batch)
                return self.run.own_values(inputs) or self._sitters_values(inputs)
            finally:
                vars(trainer).update(before)

    def _sitters_values(self, inputs: Any) -> "Tensor | Mapping[str, Tensor]":
        trainer, tap = self._trainer, self.run.tap
        given = dict(inputs)
        has_own = hasattr(trainer, "example_values")
        labels = given.get("labels")  # counted as Trainer does, here of one micro-batch
        items = labels.ne(-100).sum() if isinstance(labels, Tensor) else None
        with trainer.compute_loss_context_manager(), _last_output(trainer.model) as output:
            if has_own:
                tap.stop()  # it would keep a graph for losses that nobody asks for
            loss: Tensor = self._compute_loss(trainer.model, inputs, num_items_in_batch=items)
        if has_own:
            return trainer.example_values() or {}
        values = tap.stop(loss)
        return values or self._of_outputs(given, output.get("last"), tap.rows) or loss

    def _of_outputs(self, inputs: Any, outputs: Any, rows: int) -> Mapping[str, Tensor] | None:
        if getattr(self._trainer.args, "loss_type", None) == "dft":  # TRL's
            found: Any = "the loss of loss_type='dft' is not that of the outputs"
        else:
            found = output_losses(self._trainer.model, inputs, outputs, rows)
        self._unmeasured = found if isinstance(found, str) else ""
        return None if isinstance(found, str) else found


@contextmanager
def _last_output(model: Any) -> Iterator[dict[str, Any]]:
    """Keeps what a model returned "last", so that nobody has to ask a trainer for it."""
    found: dict[str, Any] = {}

    def keep(module: Any, args: Any, output: Any) -> None:
        found["last"] = output

    handle = model.register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


def _records(trainer: Any) -> dict[str, Any]:
    """What TRL's trainers count and average in a forward pass, to be logged."""
    own = vars(trainer)
    numbers = {name: value for name, value in own.items() if isinstance(value, (int, float))}
    return numbers | {name: copy.deepcopy(own[name]) for name in ("_metrics",) if name in own}


def _obstacle(now: Moment, trainer: Any) -> str:
    if trainer is None:
        return "the Trainer of the run is not known"
    if hasattr(trainer, "example_values_refusal") and trainer.example_values_refusal():
        return str(trainer.example_values_refusal())
    if now.args.n_gpu > 1:
        return "DataParallel splits batches; start one process per device (torchrun)"
    if place_in_run(now.state, "sitting out") > 1:
        return "another callback of this run has examples sit out"
    return sit_out_refusal(now.loader)


def _agree(now: Moment, reason: str) -> None:
    """Raise on all ranks if there is a reason on one."""
    flag = torch.tensor(float(bool(reason)), device=now.args.device)
    if float(mean_over_ranks(flag)) > 0:
        raise NotAvailable(reason or "another process cannot")

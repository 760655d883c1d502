"""`suggest_learning_rate(trainer)`: short trainings of a Trainer as it is, which leave no trace."""

import copy
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    DefaultFlowCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import CallbackHandler

from poprisk_integrations.diagnostics.data_pass import batch_count
from poprisk_integrations.diagnostics.learning_rate_finder import (
    FinderOptions,
    LearningRateSuggestion,
    find_learning_rate,
)
from poprisk_integrations.diagnostics.learning_rate_scaling import scale_learning_rates
from poprisk_integrations.diagnostics.left_as_found import LeftAsFound
from poprisk_integrations.diagnostics.rate_probe import RateProbe, peak_rate
from poprisk_integrations.diagnostics.run_length import epoch_steps
from poprisk_integrations.diagnostics.without_traces import randomness_kept

__all__ = ["suggest_learning_rate"]

# The run of a search writes, evaluates and reports nothing; its rates are the probe's.
_SILENT: dict[str, Any] = {
    "save_strategy": "no",
    "eval_strategy": "no",
    "logging_strategy": "no",
    "logging_first_step": False,
    "eval_on_start": False,
    "load_best_model_at_end": False,
    "push_to_hub": False,
    "lr_scheduler_type": "constant",
    "lr_scheduler_kwargs": {},
    "warmup_steps": 0,
    "skip_memory_metrics": True,
}


def suggest_learning_rate(
    trainer: Trainer,
    steps: int = 100,
    score_batches: int = 16,
    *,
    start: float | None = None,
    factor: float = 4.0,
    candidates: int = 8,
    update: bool = False,
) -> LearningRateSuggestion:
    """Search for a learning rate before `trainer.train()`, without validation data.

    Each rate trains `steps` steps from the same weights on the same batches, with a short warm-up
    and a linear decay to zero, and is scored by the loss of the `score_batches` batches after
    them, which it has not seen. From `start` the search goes up by `factor` while that helps, else
    down; a parabola through the best three and the length of the run give the suggestion.

    The trainings are `Trainer.train` itself: accumulation, clipping, mixed precision, adapters,
    DDP and the trainer's own loss are as in the run, callbacks and reports are left out. Afterwards
    weights, optimizer, random numbers and the trainer's attributes are as before.

    Args:
        trainer: A Trainer, or one of TRL's, that was not trained yet.
        steps: Optimizer steps with each rate, >= 20. Fewer if an epoch is short.
        score_batches: Optimizer steps' worth of batches that score a rate, >= 8.
        start: First rate to try, > 0; None for 1e-3, or 3e-2 with SGD.
        factor: Ratio of neighbouring rates, > 1.
        candidates: Most rates to try, >= 3; four or five are usual.
        update: Whether the trainer takes the suggestion over: as `args.learning_rate`, and, if it
            was given an optimizer, in this one's groups and their schedule.

    Returns:
        The suggestion, the same on all ranks.

    Raises:
        ValueError: If a value is outside its range, an epoch too short, the model sharded (FSDP,
            DeepSpeed), or no rate trains.

    Example:
        >>> import torch
        >>> from transformers import TrainingArguments
        >>> data = [{"x": torch.randn(3), "labels": torch.randn(1)} for _ in range(240)]
        >>> class Net(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(3, 1)
        ...     def forward(self, x, labels):
        ...         return {"loss": (self.layer(x) - labels).square().mean()}
        >>> args = TrainingArguments(
        ...     "out", use_cpu=True, report_to="none", disable_tqdm=True
        ... )
        >>> trainer = Trainer(Net(), args, train_dataset=data)
        >>> found = suggest_learning_rate(trainer, steps=20, score_batches=8)
        >>> found.low < found.suggested < found.high
        True
    """
    options = FinderOptions(
        steps=steps, score_batches=score_batches, start=start, factor=factor, candidates=candidates
    )
    for is_sharded, name in (
        (trainer.is_fsdp_enabled, "FSDP"),
        (trainer.is_deepspeed_enabled, "DeepSpeed"),
    ):
        if is_sharded:
            raise ValueError(
                f"Cannot search for a learning rate under {name}: its shards cannot be put back "
                "and prepared again. Search on one device or under DDP, with as many examples in "
                "an optimizer step."
            )
    args = trainer.args
    given = trainer.optimizer
    peaks = [peak_rate(group) for group in given.param_groups] if given is not None else []
    with randomness_kept():
        loader = trainer.get_train_dataloader()
    per_epoch = epoch_steps(batch_count(loader), args.gradient_accumulation_steps)
    found = find_learning_rate(
        _training(trainer),
        options,
        optimizer=given or Trainer.get_optimizer_cls_and_kwargs(args)[0],
        epoch_steps=per_epoch,
        total_steps=_run_steps(args, per_epoch),
        bar=None if args.disable_tqdm or not trainer.is_local_process_zero() else tqdm,
    )
    if update:
        args.learning_rate = found.suggested
        if given is not None:
            scale_learning_rates([given], [trainer.lr_scheduler], found.suggested / max(peaks))
    return found


def _run_steps(args: TrainingArguments, per_epoch: int | None) -> int | None:
    if args.max_steps > 0:
        return int(args.max_steps)
    return None if per_epoch is None else max(1, round(args.num_train_epochs * per_epoch))


def _training(trainer: Any) -> Any:
    optimizers = [] if trainer.optimizer is None else [trainer.optimizer]
    scaler = getattr(trainer.accelerator, "scaler", None)  # only under fp16
    found = LeftAsFound(
        trainer.model, optimizers, owners=[trainer], stateful=[] if scaler is None else [scaler]
    )

    def train(probe: RateProbe) -> None:
        with found():
            trainer.args = _silent(trainer.args, probe)
            # A schedule that was given would set its own rates; a new constant one sets none.
            trainer.lr_scheduler = None
            trainer.control = TrainerControl()
            trainer.state = TrainerState()
            trainer.callback_handler = CallbackHandler(  # type: ignore[no-untyped-call]
                [DefaultFlowCallback(), _ProbeCallback(probe)],
                trainer.model,
                trainer.processing_class,
                trainer.optimizer,
                None,
            )
            training_step = trainer.training_step

            def recording(*args: Any, **kwargs: Any) -> Tensor:
                loss: Tensor = training_step(*args, **kwargs)
                probe.add(loss)
                return loss

            trainer.training_step = recording
            trainer.train()
            trainer.accelerator.free_memory()  # of the models and optimizers it has prepared

    return train


def _silent(args: TrainingArguments, probe: RateProbe) -> TrainingArguments:
    """A copy that the checks of a new instance do not see: `args` passed them already."""
    silent = copy.copy(args)
    for name, value in _SILENT.items():
        setattr(silent, name, value)
    silent.max_steps = probe.steps + probe.score_batches
    silent.learning_rate = probe.rate
    return silent


class _ProbeCallback(TrainerCallback):
    def __init__(self, probe: RateProbe) -> None:
        self._probe = probe

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._probe.before_step(kwargs["optimizer"])

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        self._probe.after_step()

"""What Trainer knows of a run and does not tell its callbacks: where it writes, what it draws."""

import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from poprisk_integrations.diagnostics.schedule_outlook import ScheduleOutlook

__all__ = [
    "Moment",
    "batch_size_of",
    "checkpoint_directory",
    "checkpoint_path",
    "global_batch_size",
    "norm_before_clipping",
    "place_in_run",
    "real_batch_size",
    "remember_checkpoint",
    "remember_norm",
    "remember_run",
    "run_directory",
    "trainer_of",
]

_FACTS = "poprisk_run"  # no field of the dataclass TrainerState: never saved
_RANKS_THAT_SHARE_EXAMPLES = ("tp_size", "cp_size", "sp_size")


@dataclass(frozen=True)
class Moment:
    """What Trainer hands to a hook."""

    args: TrainingArguments
    state: TrainerState
    control: TrainerControl
    optimizer: Any = None
    model: Any = None
    scheduler: Any = None
    loader: Any = None

    @classmethod
    def of(
        cls,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        given: Mapping[str, Any],
    ) -> "Moment":
        """From a hook's arguments."""
        names = ("optimizer", "model", "lr_scheduler", "train_dataloader")
        return cls(args, state, control, *map(given.get, names))

    def schedule_outlook(self) -> ScheduleOutlook:
        """What the learning rate will do from here on."""
        steps = {"total_steps": self.state.max_steps, "step": self.state.global_step}
        return ScheduleOutlook(self.optimizer, self.scheduler, **steps)


@dataclass
class _Facts:
    """Lie on the state of a run, and end with it."""

    trainer: Any = None  # a weak reference, which keeps no trainer alive
    directory: str | None = None
    batch_size: int = 0  # examples of a micro-batch in this process: Trainer may have lowered it
    ranks: int = 1  # that see different examples
    loaded_from: str | None = None
    norm: Any = None  # of the gradients before clipping, and of which step
    places: dict[str, int] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "trainer": None}  # states are copied and pickled


def _facts(state: TrainerState) -> _Facts:
    facts: _Facts = state.__dict__.setdefault(_FACTS, _Facts())
    return facts


def remember_run(state: TrainerState, trainer: Any, trial: Any) -> None:
    """Note the facts of a run that is about to start; called for each attempt and trial."""
    facts = _facts(state)
    facts.trainer = weakref.ref(trainer)
    facts.directory = str(trainer._get_output_dir(trial))
    facts.batch_size = int(trainer._train_batch_size)
    facts.ranks = _ranks_with_examples(trainer.args, trainer.accelerator)


def remember_checkpoint(state: TrainerState, json_path: str | os.PathLike[str]) -> None:
    """Note the file that a state was loaded from."""
    _facts(state).loaded_from = os.path.dirname(os.path.abspath(json_path))


def remember_norm(state: TrainerState, norm: Any) -> None:
    """Note the norm before clipping of the gradients of the step to come."""
    _facts(state).norm = (state.global_step, norm)


def norm_before_clipping(state: TrainerState) -> Any:
    """Norm of the gradients of the step to come before they were clipped; None if not known."""
    step, norm = _facts(state).norm or (None, None)
    return norm if step == state.global_step else None


def trainer_of(state: TrainerState) -> Any:
    """The Trainer of a run; None where it cannot be known."""
    reference = _facts(state).trainer
    return None if reference is None else reference()


def place_in_run(state: TrainerState, kind: str) -> int:
    """How many of a kind have asked in this run, this one included: 1 for the first."""
    places = _facts(state).places
    places[kind] = places.get(kind, 0) + 1
    return places[kind]


def run_directory(args: TrainingArguments, state: TrainerState) -> str:
    """Where Trainer puts the checkpoints of this run: one directory per trial of a search."""
    return _facts(state).directory or str(args.output_dir)


def checkpoint_directory(state: TrainerState) -> str | None:
    """Directory of the checkpoint that a run resumes from, wherever it lies; None if from none."""
    return _facts(state).loaded_from


def checkpoint_path(args: TrainingArguments, state: TrainerState) -> str:
    """Directory of the checkpoint of this step, which may not be there."""
    return os.path.join(run_directory(args, state), f"checkpoint-{state.global_step}")


def batch_size_of(args: TrainingArguments, state: TrainerState) -> int:
    """Examples per device and micro-batch, as `auto_find_batch_size` has found them."""
    return int(_facts(state).batch_size or args.train_batch_size) // max(1, int(args.n_gpu))


def real_batch_size(args: TrainingArguments, state: TrainerState) -> int | None:
    """Examples per optimizer step at present; None if Trainer has not told."""
    facts = _facts(state)
    return facts.batch_size * args.gradient_accumulation_steps * facts.ranks or None


def global_batch_size(args: TrainingArguments, accelerator: Any = None) -> int:
    """Examples per optimizer step, over all ranks and accumulated micro-batches, as configured.

    b = examples per device * accumulation steps * ranks that see different examples.
    """
    ranks = _ranks_with_examples(args, accelerator)
    return int(args.train_batch_size) * args.gradient_accumulation_steps * ranks


def _ranks_with_examples(args: TrainingArguments, accelerator: Any) -> int:
    """Those of one tensor-, context- or sequence-parallel group share their examples.

    With accelerate's `split_batches`, the ranks share one batch of the given size. The Trainer's
    accelerator may know of parallelism that `args` do not (from `accelerate launch`, or from how
    the model was loaded).
    """
    layout = getattr(accelerator, "parallelism_config", None)
    layout = layout or getattr(args, "parallelism_config", None)
    ranks = int(args.world_size)
    for name in _RANKS_THAT_SHARE_EXAMPLES:
        ranks //= getattr(layout, name, None) or 1
    return 1 if getattr(args.accelerator_config, "split_batches", False) else ranks

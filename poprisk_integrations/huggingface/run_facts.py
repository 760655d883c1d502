"""What Trainer knows of a run and does not tell its callbacks: where it writes, what it draws."""

import os
from dataclasses import dataclass
from typing import Any

from transformers import TrainerState, TrainingArguments

from poprisk_integrations.huggingface.global_batch import ranks_with_examples

__all__ = [
    "batch_size_of",
    "checkpoint_path",
    "real_batch_size",
    "remember_run",
    "run_directory",
]

_FACTS = "poprisk_run"  # no field of the dataclass TrainerState: never saved


@dataclass(frozen=True)
class _RunFacts:
    directory: str
    batch_size: int  # examples of a micro-batch in this process: Trainer may have lowered it
    ranks: int  # that see different examples


def remember_run(state: TrainerState, trainer: Any, trial: Any) -> None:
    """Note the facts of a run that is about to start; called for each attempt and trial.

    Args:
        state: Of the run.
        trainer: Its Trainer.
        trial: As Trainer was given it; None outside of a hyper-parameter search.
    """
    state.__dict__[_FACTS] = _RunFacts(
        directory=str(trainer._get_output_dir(trial)),
        batch_size=int(trainer._train_batch_size),
        ranks=ranks_with_examples(trainer.args, trainer.accelerator),
    )


def run_directory(args: TrainingArguments, state: TrainerState) -> str:
    """Where Trainer puts the checkpoints of this run: one directory per trial of a search.

    Args:
        args: Training arguments.
        state: Of the run.
    """
    facts: _RunFacts | None = state.__dict__.get(_FACTS)
    return str(args.output_dir) if facts is None else facts.directory


def checkpoint_path(args: TrainingArguments, state: TrainerState) -> str:
    """Directory of the checkpoint of this step, which may not be there."""
    return os.path.join(run_directory(args, state), f"checkpoint-{state.global_step}")


def batch_size_of(args: TrainingArguments, state: TrainerState) -> int:
    """Examples per device and micro-batch, as `auto_find_batch_size` has found them."""
    facts: _RunFacts | None = state.__dict__.get(_FACTS)
    whole = int(args.train_batch_size if facts is None else facts.batch_size)
    return whole // max(1, int(args.n_gpu))


def real_batch_size(args: TrainingArguments, state: TrainerState) -> int | None:
    """Examples per optimizer step at present; None if Trainer has not told."""
    facts: _RunFacts | None = state.__dict__.get(_FACTS)
    if facts is None:
        return None
    return facts.batch_size * args.gradient_accumulation_steps * facts.ranks

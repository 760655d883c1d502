"""Keeps the batch size of `alpha="finite"` equal to the one that Trainer really takes."""

from typing import Any

from transformers import TrainerState, TrainingArguments

from poprisk_integrations.huggingface.global_batch import global_batch_size
from poprisk_integrations.huggingface.optim_args import parse_optim_args
from poprisk_integrations.huggingface.optimizer import NAMES, optimizer_name
from poprisk_integrations.huggingface.run_facts import real_batch_size
from poprisk_integrations.optim import PopRiskAdamW

__all__ = ["follow_batch_size"]

# No fields, so never saved: on the run's state the accumulation that was last looked at, on the
# optimizer the batch size that its groups were last given.
_FOLLOWED = "poprisk_followed"


def follow_batch_size(args: TrainingArguments, state: TrainerState, optimizer: Any) -> None:
    """Before a step: correct a batch size that came from Trainer and is no longer its own.

    The optimizer outlives an attempt of `auto_find_batch_size`, a checkpoint brings the batch
    size of its own run along, and a callback may change the accumulation. A size that the user
    gave stays.

    Args:
        args: Training arguments.
        state: Of the run.
        optimizer: As Trainer hands it to callbacks.
    """
    while not isinstance(optimizer, PopRiskAdamW) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, PopRiskAdamW):
        return
    accumulation = args.gradient_accumulation_steps
    now = real_batch_size(args, state)
    if now is None or state.__dict__.get(_FOLLOWED) == accumulation:
        return
    is_named = optimizer_name(args) in NAMES and "batch_size" not in parse_optim_args(
        args.optim_args
    )
    before = optimizer.__dict__.get(_FOLLOWED, global_batch_size(args))
    for group in optimizer.param_groups:
        if group["alpha"] == "finite" and (is_named or group["batch_size"] == before):
            group["batch_size"] = now
    state.__dict__[_FOLLOWED] = accumulation
    optimizer.__dict__[_FOLLOWED] = now

"""Examples per optimizer step."""

from typing import Any

from transformers import TrainingArguments

__all__ = ["global_batch_size", "ranks_with_examples"]

_RANKS_THAT_SHARE_EXAMPLES = ("tp_size", "cp_size", "sp_size")


def global_batch_size(args: TrainingArguments, accelerator: Any = None) -> int:
    """Examples per optimizer step, over all ranks and accumulated micro-batches, as configured.

    b = examples per device * accumulation steps * ranks that see different examples.

    Args:
        args: Training arguments.
        accelerator: As for `ranks_with_examples`.
    """
    ranks = ranks_with_examples(args, accelerator)
    return int(args.train_batch_size) * args.gradient_accumulation_steps * ranks


def ranks_with_examples(args: TrainingArguments, accelerator: Any = None) -> int:
    """Ranks that see different examples.

    Those of one tensor-, context- or sequence-parallel group share theirs. With accelerate's
    `split_batches`, the ranks share one batch of the given size.

    Args:
        args: Training arguments.
        accelerator: The Trainer's, which may know of parallelism that `args` do not (from
            `accelerate launch`, or from how the model was loaded); None if there is none yet.
    """
    layout = getattr(accelerator, "parallelism_config", None)
    layout = layout or getattr(args, "parallelism_config", None)
    ranks = int(args.world_size)
    for name in _RANKS_THAT_SHARE_EXAMPLES:
        ranks //= getattr(layout, name, None) or 1
    return 1 if getattr(args.accelerator_config, "split_batches", False) else ranks

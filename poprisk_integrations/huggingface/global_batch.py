"""Examples per optimizer step."""

from typing import Any

from transformers import TrainingArguments

__all__ = ["global_batch_size"]

_RANKS_THAT_SHARE_EXAMPLES = ("tp_size", "cp_size", "sp_size")


def global_batch_size(
    args: TrainingArguments, accelerator: Any = None, batch_size: int | None = None
) -> int:
    """Examples per optimizer step, over all ranks and accumulated micro-batches.

    b = examples per device * accumulation steps * ranks that see different examples: ranks of
    one tensor-, context- or sequence-parallel group share theirs. With accelerate's
    `split_batches`, the ranks share one batch of the given size.

    Args:
        args: Training arguments.
        accelerator: The Trainer's, which may know of parallelism that `args` do not (from
            `accelerate launch`, or from how the model was loaded); None if there is none yet.
        batch_size: Examples of a micro-batch of one process, which `auto_find_batch_size` may
            have lowered; None for what `args` say.
    """
    layout = getattr(accelerator, "parallelism_config", None)
    layout = layout or getattr(args, "parallelism_config", None)
    replicas = int(args.world_size)
    for name in _RANKS_THAT_SHARE_EXAMPLES:
        replicas //= getattr(layout, name, None) or 1
    if getattr(args.accelerator_config, "split_batches", False):
        replicas = 1
    each = int(args.train_batch_size if batch_size is None else batch_size)
    return each * args.gradient_accumulation_steps * replicas

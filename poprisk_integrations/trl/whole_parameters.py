"""Parameters that ZeRO 3 has parted among the ranks, whole for a moment."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

__all__ = ["save_untrained", "whole_parameter"]


@contextmanager
def whole_parameter(parameter: Tensor, *, writes: bool = False) -> Iterator[Tensor]:
    """A parameter, whole if ZeRO 3 has parted it; what rank 0 then writes is everybody's."""
    if not hasattr(parameter, "ds_id"):
        yield parameter
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if writes else None):
        yield parameter


def save_untrained(trainer: Any, output_dir: str) -> None:
    """Save the model of a DeepSpeed trainer that has no engine yet, and so cannot do it itself."""
    is_writer, state = trainer.args.should_save, {}
    for name, value in trainer.model.state_dict(keep_vars=True).items():
        with whole_parameter(value) as whole:
            if is_writer:
                state[name] = whole.detach().cpu().clone()
    if is_writer:
        trainer.model.save_pretrained(output_dir, state_dict=state)
        trainer.processing_class.save_pretrained(output_dir)

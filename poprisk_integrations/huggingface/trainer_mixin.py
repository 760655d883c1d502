"""Trainer subclasses with PopRiskAdamW in place of AdamW."""

from typing import Any

from poprisk_integrations.huggingface.optimizer import (
    NAMES,
    check_training_arguments,
    optimizer_name,
)
from poprisk_integrations.huggingface.registration import OptimizerFactory

__all__ = ["PopRiskTrainerMixin"]

_ADAMW_NAMES = ("adamw_torch", "adamw_torch_fused")


def _refuse(args: Any, model: Any = None) -> Any:
    raise ValueError(
        f"Invalid optim: {optimizer_name(args)!r}. PopRiskTrainerMixin puts PopRiskAdamW in the "
        f"place of AdamW only: use one of {(*_ADAMW_NAMES, *NAMES)}, or leave the mixin out."
    )


class PopRiskTrainerMixin:
    """Mixin for `transformers.Trainer` and its subclasses: PopRiskAdamW instead of AdamW.

        class MyTrainer(PopRiskTrainerMixin, SFTTrainer): ...

    Overrides the optimizer factory: `optim="adamw_torch"` and `"adamw_torch_fused"` (Trainer's
    default) give PopRiskAdamW with the options in `args.optim_args`; any other optimizer is
    refused. An optimizer or `optimizer_cls_and_kwargs` passed to the trainer is kept, where
    Trainer keeps it (under DeepSpeed it drops `optimizers`).

    Raises:
        ValueError: If DeepSpeed would replace the optimizer.
    """

    get_optimizer_cls_and_kwargs = OptimizerFactory(_refuse, (*NAMES, *_ADAMW_NAMES))

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # With an "optimizer" section in its config, DeepSpeed never asks for ours.
        check_training_arguments(self.args)  # type: ignore[attr-defined]

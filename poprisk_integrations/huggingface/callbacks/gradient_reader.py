"""What a run under Trainer shows of its steps: gradients, learning rate, clipping."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from poprisk_integrations.core.window import WindowRatio
from poprisk_integrations.diagnostics import GradientWindow
from poprisk_integrations.diagnostics.learning_rate_scaling import largest_lr
from poprisk_integrations.distributed import is_dtensor
from poprisk_integrations.huggingface.callbacks.clipping import Clipping
from poprisk_integrations.huggingface.callbacks.deepspeed_gradients import DeepSpeedGradients
from poprisk_integrations.huggingface.callbacks.loss_scale import (
    fused_loss_scale,
    inverse_loss_scale,
)

__all__ = ["GradientReader"]


class GradientReader:
    """Feeds a `GradientWindow` at each optimizer step, whatever shards the model.

        single, DDP    `.grad` of the optimizer's parameters, the same on all ranks
        FSDP2          the same, DTensors
        FSDP1          the same, plain shards: sums are added over FSDP's process group
        DeepSpeed      from the optimizer's state (`DeepSpeedGradients`)

    Gradients are read as Trainer hands them to the optimizer: averaged over micro-batches and
    ranks. The loss scale of fp16 is divided out, and clipping where its factor is known.

    Args:
        args: Training arguments.
        optimizer: As Trainer hands it to callbacks.
        model: Same.
        steps: Optimizer steps per window.
        accumulator: As in `GradientWindow`.
        epoch_steps: Same.

    Attributes:
        window: The window.
        clipping: What clipping did.
        lr: Learning rate of the last step that was read; of groups with different ones the
            largest.
        is_sharded: Whether each rank holds only its part of the window.

    Raises:
        ValueError: If DeepSpeed runs an optimizer or a mode whose gradients cannot be recovered.
    """

    def __init__(
        self,
        args: TrainingArguments,
        optimizer: Any,
        model: nn.Module | None,
        *,
        steps: int,
        accumulator: str,
        epoch_steps: int | None,
    ) -> None:
        self._args = args
        self._optimizer = optimizer
        self._deepspeed: DeepSpeedGradients | None = None
        self._accumulator = accumulator
        self._shard_group: Any = None
        max_norm = float(args.max_grad_norm or 0.0)
        if getattr(args, "deepspeed_plugin", None) is not None:
            assert model is not None
            if accumulator == "exact":
                raise ValueError(
                    "Invalid accumulator: 'exact'. Under DeepSpeed it must be 'auto' or 'sample'."
                )
            self._deepspeed = DeepSpeedGradients(optimizer, model, torch.device(args.device))
            max_norm = self._deepspeed.max_norm
        else:
            self._shard_group = _fsdp1_group(model)
        self.window = self._window(steps, epoch_steps)
        self.clipping = Clipping(max_norm, steps)
        self.lr = largest_lr(optimizer)
        self._loss_scale: float | None = None
        self.is_sharded = (
            bool(args.fsdp)
            or self._deepspeed is not None
            or self._shard_group is not None
            or any(is_dtensor(p) for p in self.parameters())
        )

    def parameters(self) -> list[Tensor]:
        """The optimizer's parameters."""
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def plan(self, steps: int, epoch_steps: int | None) -> None:
        """Start afresh with windows of another length."""
        self.window = self._window(steps, epoch_steps)

    def read(self) -> None:
        """Take in one step: before the optimizer's step, under DeepSpeed after it."""
        self.lr = largest_lr(self._optimizer)
        if self._deepspeed is not None:
            self.clipping.note_norm(self._deepspeed.norm_before_clipping())
            self._deepspeed.add_to(self.window, self.clipping.factor(()))
            return
        params = self.parameters()
        self.clipping.max_norm = float(self._args.max_grad_norm or 0.0)  # a callback may change it
        scale = self.clipping.factor(params)
        self.window.add(params, scale=scale * inverse_loss_scale(self._optimizer))
        self._loss_scale = fused_loss_scale(self._optimizer)

    def close(self) -> WindowRatio | None:
        """End the window, see `GradientWindow.close`."""
        self.clipping.close(self._shard_group)
        return self.window.close()

    def was_skipped(self) -> bool:
        """Whether the grad scaler skipped the step that has just ended."""
        if getattr(self._optimizer, "step_was_skipped", False):
            return True
        before = self._loss_scale
        return before is not None and (fused_loss_scale(self._optimizer) or 0.0) < before

    def _window(self, steps: int, epoch_steps: int | None) -> GradientWindow:
        if self._deepspeed is not None:
            return self._deepspeed.window(steps, epoch_steps)
        return GradientWindow(
            steps,
            accumulator=self._accumulator,  # type: ignore[arg-type]
            shard_group=self._shard_group,
            epoch_steps=epoch_steps,
        )


def _fsdp1_group(model: nn.Module | None) -> Any:
    """Process group over which FSDP1 shards, None if it does not."""
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    for module in model.modules() if model is not None else ():
        if isinstance(module, FullyShardedDataParallel):
            is_whole = module.sharding_strategy == ShardingStrategy.NO_SHARD
            return None if is_whole else module.process_group
    return None

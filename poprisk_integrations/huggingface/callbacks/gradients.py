"""What a run under Trainer shows of its gradients: their clipping, their scale, their optimizer."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from poprisk_integrations.core.window import WindowRatio
from poprisk_integrations.diagnostics import GradientWindow
from poprisk_integrations.diagnostics.gradient_reader import GradientReader, fsdp1_group
from poprisk_integrations.diagnostics.run_length import RunPlan
from poprisk_integrations.distributed import is_dtensor, local_tensor, sum_over_shards
from poprisk_integrations.huggingface.callbacks.deepspeed_gradients import DeepSpeedGradients
from poprisk_integrations.huggingface.run_facts import Moment, norm_before_clipping

__all__ = ["Clipping", "TrainerGradients", "inverse_loss_scale"]

_TOLERANCE = 1e-3
_EPS = 1e-6  # in torch's clip_grad_norm_ and in DeepSpeed's
_LOOKS_PER_WINDOW = 8


class TrainerGradients(GradientReader):
    """Reads each optimizer step, whatever shards the model.

        single, DDP    `.grad` of the optimizer's parameters, the same on all ranks
        FSDP2          the same, DTensors
        FSDP1          the same, plain shards: sums are added over FSDP's process group
        DeepSpeed      from the optimizer's state (`DeepSpeedGradients`), after the engine's step

    Gradients are read as Trainer hands them to the optimizer: averaged over micro-batches and
    ranks. The loss scale of fp16 is divided out, and clipping where its factor is known. Raises
    ValueError if DeepSpeed runs an optimizer or a mode whose gradients cannot be recovered.
    """

    def __init__(
        self, now: Moment, plan: RunPlan, *, accumulator: str, warn: Callable[[str], None]
    ) -> None:
        args, optimizer, model = now.args, now.optimizer, now.model
        self._deepspeed: DeepSpeedGradients | None = None
        group, max_norm = None, float(args.max_grad_norm or 0.0)
        if getattr(args, "deepspeed_plugin", None) is None:
            group = fsdp1_group(model)
        elif accumulator == "exact":
            raise ValueError(
                "Invalid accumulator: 'exact'. Under DeepSpeed it must be 'auto' or 'sample'."
            )
        else:
            self._deepspeed = DeepSpeedGradients(optimizer, model, torch.device(args.device))
            max_norm = self._deepspeed.max_norm
        super().__init__(optimizer, plan, accumulator=accumulator, shard_group=group, warn=warn)
        self.clipping = Clipping(max_norm, plan.window)
        self.is_sharded |= bool(args.fsdp) or self._deepspeed is not None

    def read_step(self, now: Moment) -> None:
        """Take in one step: before the optimizer's step, under DeepSpeed after it."""
        if self._deepspeed is not None:
            scale = self.clipping.factor((), self._deepspeed.norm_before_clipping())
        else:
            self.clipping.max_norm = float(now.args.max_grad_norm or 0.0)  # it may change
            scale = self.clipping.factor(self.parameters(), norm_before_clipping(now.state))
            scale = scale * inverse_loss_scale(self._optimizer)
        self.read(self._optimizer, now.state.global_step, scale=scale)

    def take_lr(self) -> float:
        """`lr` of the step that has just ended; 0 if it was skipped."""
        if self._deepspeed is not None:
            return 0.0 if self._optimizer.step_was_skipped else self.lr
        return super().take_lr()

    def close(self, step: int) -> WindowRatio | None:
        """End the window; None where nothing was measured. Every rank must call."""
        self.clipping.close(self._shard_group)
        return super().close(step)

    def _new_window(self) -> GradientWindow:
        if self._deepspeed is not None:
            return self._deepspeed.window(self.plan.window, self.plan.epoch_steps)
        return super()._new_window()

    def _add(self, scale: float | Tensor) -> None:
        if self._deepspeed is not None:
            self._deepspeed.add_to(self.window, scale)
        else:
            super()._add(scale)


class Clipping:
    """Undoes clipping where the norm before it is known, else counts the clipped steps.

    Clipping multiplies the gradient of step t by
        s_t = min(1, max_norm / (|g_t| + 1e-6))
    so 1 / s_t undoes it. Without |g_t|, a step counts as clipped if its norm is `max_norm` to
    1e-3. Nothing is read from the device, and no rank asks another, before `close`.

    Attributes:
        max_norm: `max_grad_norm`, 0 for no clipping; may be changed between steps.
        is_undone: Whether the norm before clipping was known.
    """

    def __init__(self, max_norm: float, window_steps: int) -> None:
        self.max_norm = max_norm
        self.is_undone = False
        self._steps = self._clipped = 0  # of those that were looked at, in closed windows
        # A norm takes a pass over all gradients: some steps of a window stand for the others.
        self._every = max(1, window_steps // _LOOKS_PER_WINDOW)
        self._seen = 0
        self._was_clipped: list[Any] = []  # per step with a known norm
        self._norms_sq: list[Tensor] = []  # per step without, (L,) each
        self._tensors: list[Tensor] = []

    @property
    def fraction(self) -> float | None:
        """Share of clipped steps; None before the first closed window or without clipping."""
        return self._clipped / self._steps if self._steps else None

    @property
    def matters(self) -> bool:
        """Whether most steps were clipped and nothing undoes it."""
        return not self.is_undone and self._clipped > 0.5 * self._steps

    def factor(self, params: Sequence[Tensor], norm: Any) -> float | Tensor:
        """1 / s_t of the present step, 1 where its norm before clipping is None. Once per step."""
        self._seen += 1
        if not self.max_norm:
            return 1.0
        if norm is None:
            if (self._seen - 1) % self._every == 0:
                self._look(params)
            return 1.0
        self.is_undone = True
        factor: float | Tensor
        if isinstance(norm, Tensor):
            whole: Tensor = norm.full_tensor() if is_dtensor(norm) else norm  # type: ignore[attr-defined]
            factor = ((whole.detach().float() + _EPS) / self.max_norm).clamp(min=1.0)
            # On the host no sync is saved, and numbers are cheaper than tensors.
            factor = factor if whole.device.type != "cpu" else float(factor)
        else:
            factor = max(1.0, (float(norm) + _EPS) / self.max_norm)
        self._was_clipped.append(factor > 1.0)
        return factor

    def close(self, shard_group: Any = None) -> None:
        """Count, once per window and on all ranks alike. At most one sync."""
        flags: list[bool] = []
        if self._norms_sq:
            totals = sum_over_shards(torch.stack(self._norms_sq), self._tensors, shard_group)
            norms = totals.sum(1).sqrt().cpu()
            flags += ((norms / self.max_norm - 1.0).abs() < _TOLERANCE).tolist()
        if self._was_clipped:
            on_device = isinstance(self._was_clipped[0], Tensor)
            flags += torch.stack(self._was_clipped).tolist() if on_device else self._was_clipped
        self._steps += len(flags)
        self._clipped += sum(flags)
        self._norms_sq, self._was_clipped, self._seen = [], [], 0

    def verdict(self) -> str | None:
        """What the clipped steps mean for F, in one line; None if no step was clipped."""
        if not self._clipped:
            return None
        share = f"{self._clipped / self._steps:.0%} of the steps were clipped to {self.max_norm:g}"
        if self.is_undone:
            return f"{share}, which is undone for F."
        return (
            f"{share}, so F is of clipped gradients, in which steps with large gradients weigh "
            "less. transformers >= 5.3 tells the norm before clipping, which undoes it."
        )

    def _look(self, params: Sequence[Tensor]) -> None:
        tensors = [p for p in params if p.requires_grad]
        if not tensors:
            return
        if [id(p) for p in tensors] != [id(p) for p in self._tensors]:
            self._norms_sq = []  # the trained parameters have changed, and the window starts afresh
        grads = [None if p.grad is None else local_tensor(p.grad) for p in tensors]
        present = [g for g in grads if g is not None]
        found = iter(torch._foreach_norm(present, 2, torch.float32) if present else ())
        zero = torch.zeros((), device=tensors[0].device)
        norms = [zero if g is None else next(found).to(zero.device) for g in grads]
        self._norms_sq.append(torch.stack(norms).square())
        self._tensors = tensors


def inverse_loss_scale(optimizer: Any) -> float:
    """1 / loss scale where the gradients are still scaled, else 1; of accelerate's optimizer.

    Trainer unscales before it clips, and since 5.3 also where it does not clip; before, the
    scaler does so within `step`, and a fused optimizer in its kernel. Which of these it will be
    only the scaler knows, and torch offers no question for it: `_per_optimizer_states` is read
    here and nowhere else.
    """
    scaler = getattr(optimizer, "scaler", None)
    if scaler is None or not scaler.is_enabled():
        return 1.0
    states = scaler._per_optimizer_states
    state = states.get(id(optimizer.optimizer)) or states.get(id(optimizer))
    if state is not None and state["stage"] is OptState.UNSCALED:
        return 1.0
    return 1.0 / float(scaler.get_scale())

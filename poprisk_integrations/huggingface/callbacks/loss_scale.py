"""The fp16 loss scale that gradients may still carry."""

from typing import Any

from torch.amp.grad_scaler import OptState

__all__ = ["fused_loss_scale", "inverse_loss_scale"]


def inverse_loss_scale(optimizer: Any) -> float:
    """1 / loss scale where the gradients are still scaled, else 1.

    Trainer unscales before it clips, and since 5.3 also where it does not clip; before, the
    scaler does so within `step`, and a fused optimizer in its kernel. Which of these it will be
    only the scaler knows, and torch offers no question for it: `_per_optimizer_states` is read
    here and nowhere else.

    Args:
        optimizer: As Trainer hands it to callbacks (`accelerate.optimizer.AcceleratedOptimizer`).
    """
    scaler = getattr(optimizer, "scaler", None)
    if scaler is None or not scaler.is_enabled():
        return 1.0
    states = scaler._per_optimizer_states
    state = states.get(id(optimizer.optimizer)) or states.get(id(optimizer))
    if state is not None and state["stage"] is OptState.UNSCALED:
        return 1.0
    return 1.0 / float(scaler.get_scale())


def fused_loss_scale(optimizer: Any) -> float | None:
    """The loss scale where a fused optimizer skips overflowing steps in its kernel, else None.

    Then `step_was_skipped` stays False, and only a scale that falls tells of the overflow.

    Args:
        optimizer: As Trainer hands it to callbacks.
    """
    scaler = getattr(optimizer, "scaler", None)
    if scaler is None or not scaler.is_enabled():
        return None
    is_fused = getattr(optimizer.optimizer, "_step_supports_amp_scaling", False)
    return float(scaler.get_scale()) if is_fused else None

"""Several small tensors averaged over ranks in one collective."""

from collections.abc import Sequence

import torch
from torch import Tensor

from poprisk_integrations.distributed import mean_over_ranks

__all__ = ["joint_mean"]


def joint_mean(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Means over all ranks, on the host.

    Args:
        tensors: Same shapes on all ranks.
        device: Of the ranks' communication.

    Example:
        >>> joint_mean([torch.ones(2), torch.zeros(1, 1)], torch.device("cpu"))[1]
        tensor([[0.]], dtype=torch.float64)
    """
    dtype = torch.float32 if device.type == "mps" else torch.float64
    flat = torch.cat([t.detach().to(device, dtype).reshape(-1) for t in tensors])
    parts = torch.split(mean_over_ranks(flat).cpu(), [t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]

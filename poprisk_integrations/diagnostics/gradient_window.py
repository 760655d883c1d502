"""Accumulates batch gradients over a window of optimizer steps and closes it with F."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from poprisk_integrations.core.window import WindowRatio, window_signal_ratio
from poprisk_integrations.distributed import local_tensor, mean_over_ranks, sum_over_shards

__all__ = ["GradientWindow"]


class GradientWindow:
    """Running sums A_l = sum_t g_t and Q_l = sum_t |g_t|^2 per tensor, for any optimizer.

    One fp32 buffer per trained parameter, two passes over the gradients per step, no host sync
    before the window closes. A step with a non-finite gradient (a skipped fp16 step) is left
    out, decided on the device. Gradients are read, never written.

    Call `add` once per optimizer step when the gradients are complete: averaged over
    micro-batches and ranks, unscaled, and best unclipped.

    Args:
        steps: Optimizer steps in a window, >= 2.

    Raises:
        ValueError: If `steps` < 2.

    Example:
        >>> p = torch.nn.Parameter(torch.zeros(()))
        >>> window = GradientWindow(steps=2)
        >>> for g in (1.0, 3.0):
        ...     p.grad = torch.tensor(g)
        ...     window.add([p])
        >>> window.is_full, window.close().ratio
        (True, 4.0)
    """

    def __init__(self, steps: int) -> None:
        if steps < 2:
            raise ValueError(f"Invalid steps: {steps}. A window needs at least 2 optimizer steps.")
        self.steps = steps
        self._params: list[Tensor] = []
        self._seen = 0  # steps offered, finite or not: known on the host
        self._counted: Tensor | None = None  # finite steps: known on the device only
        self._sums: dict[int, Tensor] = {}  # position -> A_l, local shard, fp32
        self._sq: dict[int, Tensor] = {}  # position -> Q_l of the local shard

    @property
    def is_full(self) -> bool:
        """Whether `steps` optimizer steps were offered since the last close."""
        return self._seen >= self.steps

    @torch.no_grad()
    def add(self, params: Iterable[Tensor]) -> None:
        """Take in the gradients of one optimizer step.

        Args:
            params: The optimizer's parameters, in the same order at each call. Those without a
                gradient contribute zero.
        """
        self._params = [p for p in params if p.requires_grad]
        self._seen += 1
        positions = [i for i, p in enumerate(self._params) if p.grad is not None]
        grads = [local_tensor(self._params[i].grad).detach() for i in positions]  # type: ignore[arg-type]
        if not grads:
            return
        sq = torch.stack([n.float().square() for n in torch._foreach_norm(grads)])
        # The same verdict on all shards: the sum of the squares over them is finite or not.
        total = sum_over_shards(sq, [self._params[i] for i in positions]).sum()
        finite = torch.isfinite(total)
        zero = sq.new_zeros(())
        self._counted = (zero if self._counted is None else self._counted.to(sq.device)) + finite
        for column, (i, grad) in enumerate(zip(positions, grads, strict=True)):
            if i not in self._sums:
                self._sums[i] = torch.zeros_like(grad, dtype=torch.float32)
                self._sq[i] = zero
            elif self._sums[i].device != grad.device:  # a loaded window comes on the CPU
                self._sums[i] = self._sums[i].to(grad.device)
                self._sq[i] = self._sq[i].to(grad.device)
            self._sums[i] += torch.where(finite, grad, zero.to(grad.dtype))
            self._sq[i] = self._sq[i] + torch.where(finite, sq[column], zero)

    @torch.no_grad()
    def close(self) -> WindowRatio | None:
        """End the window: reduce over shards and ranks, return F, start afresh.

        One host sync. All ranks get the same bits, so all decide alike.

        Returns:
            The window's F, or None where fewer than two finite steps were seen.
        """
        positions = sorted(self._sums)
        counted = self._counted
        sums, sq = self._sums, self._sq
        params = [self._params[i] for i in positions]
        self.reset()
        if counted is None:
            return None
        local = torch.stack(
            [
                torch.stack([sums[i].square().sum() for i in positions]),
                torch.stack([sq[i] for i in positions]),
                torch.tensor([float(p.numel()) for p in params], device=counted.device),
            ]
        )
        local[:2] = sum_over_shards(local[:2].contiguous(), params)
        host = mean_over_ranks(torch.cat([local.flatten(), counted.reshape(1)])).double().cpu()
        steps = round(float(host[-1]))
        if steps < 2:
            return None
        norm_sq_of_sum, sum_of_norm_sq, numel = host[:-1].reshape(3, -1)
        return window_signal_ratio(norm_sq_of_sum, sum_of_norm_sq, numel, steps)

    def reset(self) -> None:
        """Forget the unfinished window."""
        self._seen = 0
        self._counted = None
        self._sums = {}
        self._sq = {}

    def state_dict(self) -> dict[str, Any]:
        """The unfinished window: numbers and tensors (A_l of the local shards), by position."""
        return {
            "seen": self._seen,
            "counted": None if self._counted is None else self._counted.clone(),
            "sums": {str(i): t.clone() for i, t in self._sums.items()},
            "sq": {str(i): t.clone() for i, t in self._sq.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue an unfinished window; tensors move to the gradients' device when needed."""
        self._seen = int(state_dict["seen"])
        counted = state_dict["counted"]
        self._counted = None if counted is None else counted.clone()
        self._sums = {int(i): t.clone() for i, t in state_dict["sums"].items()}
        self._sq = {int(i): t.clone() for i, t in state_dict["sq"].items()}

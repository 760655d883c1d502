"""What the stop looks at, for all models of a stack: the package's window statistic."""

import numpy as np
import torch
from gate_harness.stacked_adam import StackedAdam
from torch import Tensor

from poprisk_integrations.core.window import coordinate_ratio, window_signal_ratio

__all__ = ["WatchedAdam"]


class WatchedAdam(StackedAdam):
    """The harness's optimizer, which also closes a window of gradients every `window` steps.

    Per member the numbers are those of `diagnostics.GradientWindow`, with which the tests compare
    them: gradients as they come, before the step.

    Args:
        args: Those of `StackedAdam`.
        window: Steps in a window; one epoch, as `auto_window_steps` has it for runs this long.
    """

    def __init__(self, *args, window: int) -> None:
        super().__init__(*args)
        self.window = window
        self.windows: dict[str, list[list[float]]] = {"ratio": [], "ratio_se": [], "noise_sum": []}
        self.norms_sq: list[Tensor] = []
        self.sums = self.squares = torch.empty(0)

    @torch.no_grad()
    def step(self, theta: Tensor, grad: Tensor, factor: float = 1.0) -> None:
        """Take in the gradients, then step."""
        if not self.norms_sq:
            self.sums, self.squares = torch.zeros_like(grad), torch.zeros_like(grad)
        self.sums += grad
        self.squares.addcmul_(grad, grad)
        parts = grad.split(self.sizes, 1)
        self.norms_sq.append(torch.stack([part.square().sum(1) for part in parts], 1))
        if len(self.norms_sq) == self.window:
            self._close()
        super().step(theta, grad, factor)

    def _close(self) -> None:
        norms_sq = torch.stack(self.norms_sq)  # (T, M, L)
        numel = torch.tensor([float(size) for size in self.sizes])
        found: dict[str, list[float]] = {name: [] for name in self.windows}
        for member in range(norms_sq.shape[1]):
            sums = self.sums[member].split(self.sizes)
            squares = self.squares[member].split(self.sizes)
            result = window_signal_ratio(
                torch.stack([part.square().sum() for part in sums]),
                norms_sq[:, member].sum(0),
                numel,
                self.window,
                norm_sq=norms_sq[:, member],
            )
            pairs = zip(sums, squares, strict=True)
            total, alive = sum(coordinate_ratio(a, q, self.window) for a, q in pairs).tolist()
            found["ratio"].append(total / alive if alive else float("nan"))
            found["ratio_se"].append(result.ratio_se)
            found["noise_sum"].append(float(result.noise.sum()))
        for name, row in found.items():
            self.windows[name].append(row)
        self.norms_sq = []

    def arrays(self) -> dict[str, np.ndarray]:
        """Also the windows, each of shape (W, M)."""
        found = {f"window_{name}": np.array(rows) for name, rows in self.windows.items()}
        return {**super().arrays(), **found}

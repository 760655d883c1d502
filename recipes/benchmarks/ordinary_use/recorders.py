"""What is recorded beside a run: who sits out, the gradient signal, an average, losses."""

import math

import numpy as np
import torch
from benchmarks.ordinary_use.data import Examples, Task
from torch import Tensor, nn

from poprisk_integrations.core.risk_stopping import RiskStopping, RiskStoppingConfig
from poprisk_integrations.diagnostics import auto_window_steps
from poprisk_integrations.diagnostics.gradient_window import GradientWindow
from poprisk_integrations.diagnostics.schedule_outlook import ScheduleOutlook
from poprisk_integrations.diagnostics.sitting_out import SittingOut

__all__ = ["LIVE", "SIZE", "Average", "Signal", "Table", "measured"]

SIZE = 64  # examples of a forward pass without gradient
DECAY = 3.0  # of the polynomial average
# The package's rule, which only watches: with its defaults first, then variants.
LIVE = {
    "as shipped": RiskStoppingConfig(),
    "patience 5": RiskStoppingConfig(patience=5),
    "confidence 0.7": RiskStoppingConfig(confidence=0.7),
    "confidence 1.3": RiskStoppingConfig(confidence=1.3),
}


class Table:
    """Who sits out, and what everybody loses; beside it the rules, which only watch."""

    def __init__(self, n: int, epochs: int, steps: int, seed: int, outlook: ScheduleOutlook):
        self.outlook, self.steps = outlook, steps
        self.experiment = SittingOut(n, seed=seed, epochs=epochs)
        windows = self.experiment.windows
        self.rules = [
            RiskStopping(config, epoch_steps=steps, windows=windows) for config in LIVE.values()
        ]
        shape = (epochs, n)
        self.losses, self.accuracies, self.positions, self.last, self.mean = (
            torch.full(shape, torch.nan) for _ in range(5)
        )
        self.all_sits = torch.zeros(shape, dtype=torch.bool)
        self.shuffle = torch.Generator().manual_seed(60_000 + seed)
        self.epoch = -1

    def begin(self, epoch: int) -> None:
        self.epoch = epoch
        self.experiment.begin_epoch(epoch)
        sitters = self.experiment.sitters()
        self.sits = self.all_sits[epoch]
        self.sits[sitters] = True
        self.waiting = sitters[torch.randperm(len(sitters), generator=self.shuffle)]

    def due(self, j: int, batch: int) -> Tensor | None:
        """Sitters to be measured before batch j: spread evenly, at most a batch at a time."""
        count = min(self.steps, math.ceil(len(self.waiting) / batch))
        places = [s for s in range(count) if int((s + 0.5) / count * self.steps) == j]
        if not places:
            return None
        parts = torch.tensor_split(self.waiting, count)
        return torch.cat([parts[s] for s in places])

    def record(self, rows: Tensor, loss: Tensor, accuracy: Tensor, position: float) -> None:
        self.losses[self.epoch, rows] = loss
        self.accuracies[self.epoch, rows] = accuracy
        self.positions[self.epoch, rows] = position
        values = {"loss": loss, "accuracy": accuracy}
        self.experiment.record(rows, values, position=position)

    def visited(self, rows: Tensor, j: int) -> list[int]:
        """Batch j was trained on. Which rules that have not stopped see a new minimum."""
        self.experiment.visited(rows, j / self.steps)
        if not self.experiment.window_ends((j + 1) / self.steps):
            return []
        step = self.epoch * self.steps + j + 1
        row = self.experiment.close_window(step=step)
        if row is None:
            return []
        place = self.outlook.at(step)
        running = [k for k, rule in enumerate(self.rules) if rule.state.stop_step is None]
        return [k for k in running if self.rules[k].update(row, schedule=place).is_best]

    def arrays(self) -> dict[str, np.ndarray]:
        stops = [rule.state.stop_step for rule in self.rules]
        return {
            "live_stop": np.array([math.nan if stop is None else stop for stop in stops]),
            "live_keeps_best": np.array([rule.keeps_best() for rule in self.rules]),
            "losses": self.losses.numpy(),
            "accuracies": self.accuracies.numpy().astype(np.float16),
            "positions": self.positions.numpy(),
            "sits": self.all_sits.numpy(),
            "end_losses": self.last.numpy(),
            "end_average_losses": self.mean.numpy(),
        }


class Signal:
    """F of the shipped rule, window by window: `signal_step`, `_ratio`, `_ratio_se`, `_noise`."""

    def __init__(self, model: nn.Module, total: int, epoch_steps: int) -> None:
        self.rows: list[tuple[float, ...]] = []
        steps = auto_window_steps(total, epoch_steps)
        self.window = GradientWindow(steps, epoch_steps=epoch_steps)
        self.params = [p for p in model.parameters() if p.requires_grad]

    def before_step(self, step: int) -> None:
        self.window.add(self.params)
        if self.window.is_full:
            found = self.window.close()
            noise = float(found.noise.sum())
            self.rows.append((step, found.ratio, found.ratio_se, noise))

    def arrays(self) -> dict[str, np.ndarray]:
        columns = np.array(self.rows, np.float64).reshape(-1, 4).T
        names = ("step", "ratio", "ratio_se", "noise")
        return {f"signal_{name}": column for name, column in zip(names, columns, strict=True)}


class Average:
    """Polynomial-decay average: w <- w + (eta + 1) / (t + eta) (new - w).

    As a context it takes the place of the last weights.
    """

    def __init__(self, model: nn.Module) -> None:
        self.live = [p for p in model.parameters() if p.requires_grad]
        self.mean = [p.detach().clone() for p in self.live]

    @torch.no_grad()
    def update(self, step: int) -> None:
        torch._foreach_lerp_(self.mean, self.live, (DECAY + 1) / (step + DECAY))

    @torch.no_grad()
    def __enter__(self) -> None:
        self.kept = [p.detach().clone() for p in self.live]
        torch._foreach_copy_(self.live, self.mean)

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        torch._foreach_copy_(self.live, self.kept)


@torch.no_grad()
def measured(model: nn.Module, task: Task, held: Examples | None) -> dict[str, float]:
    """Mean loss, its standard error, and accuracy on clean, noisy and held-out examples."""
    model.eval()
    found = {}
    clean = predicted(model, task.clean)
    sets = {"clean": (clean, task.clean)}
    same = task.noisy.x is task.clean.x
    sets["noisy"] = (clean if same else predicted(model, task.noisy), task.noisy)
    if held is not None:
        sets["held"] = (predicted(model, held), held)
    for name, (predictions, examples) in sets.items():
        parts = [task.loss(p, y) for p, y in zip(predictions, examples.y.split(SIZE), strict=True)]
        losses = torch.cat([loss for loss, _ in parts])
        found[f"{name}_loss"] = float(losses.mean())
        found[f"{name}_loss_se"] = float(losses.std()) / math.sqrt(len(losses))
        found[f"{name}_accuracy"] = float(torch.cat([right for _, right in parts]).mean())
    return found


def predicted(model: nn.Module, examples: Examples) -> list[Tensor]:
    """Piece by piece."""
    pieces = range(0, len(examples), SIZE)
    return [model(examples.part(slice(at, at + SIZE)).x) for at in pieces]

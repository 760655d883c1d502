"""A run in which examples sit out: all between the forward passes and the estimate."""

from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from poprisk_integrations.diagnostics.example_losses import ExampleLosses
from poprisk_integrations.diagnostics.sit_out_loader import SitOutLoader
from poprisk_integrations.diagnostics.sitting_out import SittingOut
from poprisk_integrations.diagnostics.without_traces import WithoutTraces
from poprisk_integrations.distributed import world_size

__all__ = ["Forward", "RiskRun"]

# Takes a collated batch; gives the loss that is trained on, or values per example.
Forward = Callable[[Any], Tensor | Mapping[str, Tensor]]


class RiskRun:
    """Has sitters measured, visitors recorded and windows closed.

    For batch j of an epoch an adapter calls, on all ranks,

        measure_sitters(j, forward)    before its forward pass
        visited(j, values)             after its forward pass; values from `tap` or `own_values`
        batch_done(j, step)            after the optimizer step that it completes

    Nothing is synchronised but for the ends of windows, a few times per epoch.

    The loader is changed in place until `close`; one that does not tell which example is which is
    a ValueError. `example_losses` gives losses per example of (model, batch), shape (B,), where
    they cannot be found in an ordinary forward pass: it costs a second one.
    """

    def __init__(
        self,
        loader: Any,
        model: nn.Module,
        *,
        experiment: SittingOut,
        example_losses: Callable[[Any, Any], Tensor] | None = None,
        on_pass: Callable[[], Any] | None = None,
    ) -> None:
        self.experiment = experiment
        self.is_measuring = True  # until `release`
        self.tap = ExampleLosses()
        self._quiet = WithoutTraces(model)
        self.handle = SitOutLoader(loader, experiment, on_pass)
        self._model = model
        self._example_losses = example_losses

    def try_out(self, forward: Forward) -> str:
        """Why there are no losses per example, from one forward pass that leaves no trace."""
        with self._quiet.randomness():
            batch, indices = self.handle.sample()
        values, reason = self._measured(batch, len(indices), forward)
        return "" if values is not None else reason or "the trainer gives no losses per example"

    def measure_sitters(self, number: int, forward: Forward) -> None:
        """Run and record the batches of sitters that are due before a batch of this number.

        `forward` is as a training step does it, with the model in training mode; where there are
        `own_values`, it gives those.
        """
        if not self.is_measuring:
            return
        for group in self.handle.due(number):
            with self._quiet.randomness():  # a data set may draw random numbers
                batch, indices, rows = self.handle.sitters(group)
            values, _ = self._measured(batch, rows, forward)
            if values is not None and len(indices):
                kept = {name: value[: len(indices)] for name, value in values.items()}
                self.experiment.record(indices, kept, position=number / self.handle.batches)

    def own_values(self, batch: Any) -> dict[str, Tensor] | None:
        """What the user's `example_losses` says of a batch on the device; None without one."""
        if self._example_losses is None:
            return None
        with self._quiet():
            losses = self._example_losses(self._model, batch)
        if not isinstance(losses, Tensor) or losses.dim() != 1:
            shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"Invalid example_losses: it gave {shape}. It must give a tensor of shape (B,), "
                "one loss per example of the batch."
            )
        return {"loss": losses.detach().float()}

    def visited(self, number: int, values: Mapping[str, Tensor] | None) -> None:
        """Note that a batch is trained on, and what its examples lost before, where measured."""
        if not self.is_measuring:
            return
        indices, position = self.handle.indices(number), number / self.handle.batches
        self.experiment.visited(indices, position)
        if values is not None and len(values.get("loss", ())) == len(indices):
            self.experiment.record(indices, values, position=position)

    def batch_done(self, number: int, step: int) -> dict[str, Any] | None:
        """Close the window if one ends here; its row, or None."""
        done = (number + 1) / self.handle.batches
        if not self.is_measuring or not self.experiment.window_ends(done):
            return None
        row = self.experiment.close_window(step=step)
        if row is not None and world_size() > 1:
            # The first rank's: last bits of a regression depend on where its numbers lie in memory.
            rows = [row]
            dist.broadcast_object_list(rows, src=0, device=self.experiment.device)
            row = self.experiment.history[-1] = rows[0]
        return row

    def release(self) -> None:
        """From now on nobody sits out or is measured. Collective."""
        self.is_measuring = False
        self.handle.release()

    def close(self) -> None:
        """Give the loader back as it was."""
        self.tap.stop()
        self.handle.undo()

    def _measured(
        self, batch: Any, rows: int, forward: Forward
    ) -> tuple[Mapping[str, Tensor] | None, str]:
        """Values of a batch that is not trained on, or the reason why there are none."""
        with self._quiet():
            self.tap.start(rows)
            found: Tensor | Mapping[str, Tensor] | None = None
            try:
                found = forward(batch)
            finally:
                tapped = self.tap.stop(found if isinstance(found, Tensor) else None)
        values, reason = (tapped, self.tap.reason) if isinstance(found, Tensor) else (found, "")
        if values is not None and len(values.get("loss", ())) != rows:
            return None, "the losses are not as many as the examples"
        return values, reason

"""The experiment inside a run: who sits out, what they lose, what that says of new data."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from poprisk_integrations.core.risk_curve import (
    RiskEstimate,
    first_pass_estimate,
    late_joiner_estimate,
)
from poprisk_integrations.core.sit_out_schedule import first_epochs, smallest_pool
from poprisk_integrations.distributed import world_size

__all__ = ["SittingOut"]

_MOST_WINDOWS = {4: 4, 10: 2}  # of an epoch, in runs of up to so many epochs
_WINDOW_POOL = 12  # examples never trained on that a window should have


class SittingOut:
    """Estimates the test loss along a run from examples that join its training late.

    A random share of the examples sits out from the start and joins one after the other
    (`core.first_epochs`). Their losses before they join, and in the first epoch everybody's,
    are losses on data never trained on; `core.late_joiner_estimate` makes a curve of them.

    The same numbers on all ranks: who sits follows from rank 0's seed, and `join` adds up what
    the ranks have measured. All ranks construct it together.

    Args:
        examples: Number of examples of the data set, over all ranks.
        share: Of them that sits out from the start, in (0, 0.5].
        seed: Of rank 0; that of other ranks is not used.
        epochs: Planned passes over the data; None if unknown.
        device: Where ranks exchange numbers.

    Attributes:
        epoch: Present pass over the data, counted from 0; -1 before the first.
        history: One dict per window.

    Example:
        >>> experiment = SittingOut(1000, share=0.2, epochs=3)
        >>> experiment.begin_epoch(0)
        >>> len(experiment.sitters())  # half of the share, in a short run
        100
    """

    def __init__(
        self,
        examples: int,
        *,
        share: float = 0.15,
        seed: int = 0,
        epochs: float | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if examples < 1:
            raise ValueError(f"Invalid examples: {examples}. Must be >= 1.")
        if not 0.0 < share <= 0.5:
            raise ValueError(f"Invalid share: {share}. Must lie in (0, 0.5].")
        self.examples = examples
        self.share = share
        self.device = torch.device(device)
        self.seed = seed
        if world_size() > 1:  # a script may well seed each rank differently
            of_rank_0 = [seed]
            dist.broadcast_object_list(of_rank_0, src=0, device=self.device)
            (self.seed,) = of_rank_0
        self.epochs = epochs
        self.epoch = -1
        self.history: list[dict[str, Any]] = []
        self._joins = first_epochs(examples, share=share, seed=self.seed, epochs=epochs)
        self._visited = torch.zeros(examples, dtype=torch.bool)  # at the start of the open window
        self._residuals: dict[str, Tensor] = {}  # against the curve, of the last measurement
        self._residual_ses: dict[str, Tensor] = {}
        self._windows_closed = 0  # in the present epoch
        self._open: dict[str, Tensor] = {}
        self._pending: list[tuple[Tensor, float, Mapping[str, Tensor]]] = []
        self._pending_visits: list[Tensor] = []
        self._open_window()

    @property
    def windows_per_epoch(self) -> int:
        """1, or up to 4 in a run of few epochs with data enough."""
        epochs = math.inf if self.epochs is None else self.epochs
        most = next((count for length, count in _MOST_WINDOWS.items() if epochs <= length), 1)
        pool = smallest_pool(self.examples, share=self.share, epochs=self.epochs)
        return max(1, min(most, int(pool / _WINDOW_POOL)))

    @property
    def first_share(self) -> float:
        """Share of the examples that sits at the start: of many examples less than `share`."""
        return float((self._joins > 0).double().mean())

    @property
    def windows(self) -> int | None:
        """Of the whole run; None if its length is unknown."""
        return None if self.epochs is None else round(self.epochs * self.windows_per_epoch)

    def begin_epoch(self, epoch: int) -> None:
        """Go on to a pass over the data; again with the same number: no effect."""
        if epoch > self.epoch:
            self.epoch = epoch
            self._windows_closed = 0

    def sits(self) -> Tensor:
        """Who sits out of the present epoch, a bool tensor of shape (examples,)."""
        return (self._joins > self.epoch) & ~self._visited

    def sitters(self) -> Tensor:
        """The same as sorted indices."""
        return self.sits().nonzero().flatten()

    def visited(self, indices: Tensor | Sequence[int], position: float) -> None:
        """Note that these examples of the data set were trained on, at this share of the epoch."""
        self._pending_visits.append(torch.as_tensor(indices, dtype=torch.int64))

    def record(
        self, indices: Tensor | Sequence[int], values: Mapping[str, Tensor], *, position: float
    ) -> None:
        """Take in what was measured of some examples, before their update.

        Args:
            indices: Into the data set, shape (B,).
            values: Name to tensor of shape (B,), "loss" among them; NaN where not measured. They
                stay on their device until the window ends.
            position: Share of the epoch that is done, in [0, 1].
        """
        kept = {name: value.detach() for name, value in values.items()}
        self._pending.append((torch.as_tensor(indices, dtype=torch.int64), position, kept))

    def window_ends(self, position: float) -> bool:
        """Whether a window of estimates ends when this share of the epoch is done."""
        return position >= (self._windows_closed + 1) / self.windows_per_epoch - 1e-9

    def join(self) -> None:
        """Add up what the ranks have measured; then `state_dict` is the same on all. Collective."""
        names = self._names()
        n = self.examples
        sums, counts = torch.zeros(len(names) + 1, n), torch.zeros(len(names) + 2, n)
        for indices, position, values in self._pending:
            sums[-1, indices] += position
            counts[-2, indices] += 1.0
            for k, name in enumerate(names):
                if name not in values:
                    continue
                value = values[name].float().cpu()
                # Of one that comes twice the first counts: the second was trained on.
                known = value.isfinite() & (counts[k, indices] == 0)
                sums[k, indices[known]] = value[known]
                counts[k, indices[known]] = 1.0
        for indices in self._pending_visits:
            counts[-1, indices] = 1.0
        self._pending, self._pending_visits = [], []
        if world_size() > 1:
            both = torch.cat([sums, counts]).to(self.device)
            dist.all_reduce(both)
            both = both.cpu()
            sums, counts = both[: len(sums)], both[len(sums) :]
        for k, name in enumerate(names):
            table = self._open.setdefault(name, torch.full((n,), math.nan))
            fresh = (counts[k] > 0) & table.isnan()
            table[fresh] = (sums[k] / counts[k])[fresh]
        fresh = (counts[-2] > 0) & self._open_places.isnan()
        self._open_places[fresh] = (sums[-1] / counts[-2])[fresh]
        self._open_visits |= counts[-1] > 0

    def close_window(self, *, step: int) -> dict[str, Any] | None:
        """Join the ranks and estimate: a new row of `history`, if there are losses. Collective."""
        self.join()
        self._windows_closed += 1
        row: dict[str, Any] = {
            "step": step,
            "epoch": self.epoch + self._windows_closed / self.windows_per_epoch,
        }
        for name in sorted(self._open, key=lambda name: (name != "loss", name)):
            row |= self._columns(name)
        self._visited |= self._open_visits
        self._open_window()
        if row.get("train_loss") is None and row.get("estimated_test_loss") is None:
            return None
        row["signal_ratio"] = None
        self.history.append(row)
        return row

    def metrics(self) -> dict[str, float]:
        """The last row's estimates under the names that are logged."""
        if not self.history:
            return {}
        return {
            f"poprisk/{name}": value
            for name, value in self.history[-1].items()
            if name.startswith("estimated_") and "_change_" not in name and value is not None
        }

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and None, safe for `weights_only` loading. Call `join` before."""
        return {
            "examples": self.examples,
            "share": self.share,
            "seed": self.seed,
            "epoch": self.epoch,
            "windows_closed": self._windows_closed,
            "history": [dict(row) for row in self.history],
            "visited": self._visited.clone(),
            "residuals": _copies(self._residuals),
            "residual_ses": _copies(self._residual_ses),
            "open": _copies(self._open),
            "open_places": self._open_places.clone(),
            "open_visits": self._open_visits.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue, also if the length has changed; other data, share or seed is a ValueError."""
        for name in ("examples", "share", "seed"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"The checkpoint was made with {name}={state[name]}, this run has "
                    f"{getattr(self, name)}."
                )
        self.epoch = state["epoch"]
        self._windows_closed = state["windows_closed"]
        self.history = [dict(row) for row in state["history"]]
        self._visited = state["visited"].clone()
        self._residuals = _copies(state["residuals"])
        self._residual_ses = _copies(state["residual_ses"])
        self._open = _copies(state["open"])
        self._open_places = state["open_places"].clone()
        self._open_visits = state["open_visits"].clone()
        self._pending, self._pending_visits = [], []

    def _open_window(self) -> None:
        self._open = {}
        self._open_places = torch.full((self.examples,), math.nan)
        self._open_visits = torch.zeros(self.examples, dtype=torch.bool)

    def _names(self) -> list[str]:
        """What is measured, agreed among the ranks."""
        found = {name for _, _, values in self._pending for name in values} | set(self._open)
        if world_size() > 1:
            every: list[Any] = [None] * world_size()
            dist.all_gather_object(every, sorted(found))
            found = {name for part in every for name in part}
        return sorted(found)

    def _columns(self, name: str) -> dict[str, float | None]:
        measured = self._open[name]
        is_new = measured.isfinite() & ~self._visited
        is_known = measured.isfinite() & self._visited
        has_known = bool(is_known.any())
        # In the first epoch those who are trained on are new as well.
        trained = measured[is_known if has_known else is_new & self._open_visits].double()
        train = float(trained.mean()) if len(trained) else None
        train_se = float(trained.std()) / math.sqrt(len(trained)) if len(trained) > 1 else None
        test = self._estimate(name, is_new)
        value, se, change_se = (
            (None, None, None) if test is None else (test.value, test.se, test.change_se)
        )
        row: dict[str, float | None] = {f"train_{name}": train, f"train_{name}_se": train_se}
        if name == "loss":
            gap = None if value is None or train is None else value - train
            gap_se = None if se is None or train_se is None else math.hypot(se, train_se)
            if test is not None and not has_known:
                gap, gap_se = 0.0, 0.0
            row |= {"estimated_gap": gap, "estimated_gap_se": gap_se}
        key = f"estimated_test_{name}"
        return {**row, key: value, f"{key}_se": se, f"{key}_change_se": change_se}

    def _estimate(self, name: str, is_new: Tensor) -> RiskEstimate | None:
        values, places = self._open[name][is_new], self._open_places[is_new]
        n = self.examples
        residuals = self._residuals.setdefault(name, torch.full((n,), math.nan))
        ses = self._residual_ses.setdefault(name, torch.full((n,), math.nan))
        if self.epoch == 0:
            found = first_pass_estimate(values, places)
        else:
            found = late_joiner_estimate(values, places, residuals[is_new], ses[is_new])
        if found is not None:
            residuals[is_new] = found.residuals.float()
            ses[is_new] = found.se
        return found


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}

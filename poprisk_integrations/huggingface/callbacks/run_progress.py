"""What a callback with windows remembers beside its rule's numbers: ready for JSON."""

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from poprisk_integrations.core.window import WindowRatio
from poprisk_integrations.diagnostics.window_history import MEASURES, history_row

__all__ = ["RunProgress"]


@dataclass(kw_only=True)
class RunProgress:
    """Everything that a resumed run needs.

    Attributes:
        window_seen: Steps in the unfinished window.
        window_reused: Whether it began after a whole pass over the data.
        batches: Micro-batches that this process has drawn; None in a state of an older version.
        pass_batches: Micro-batches of one pass over the data; None if unknown.
        window_file: Name of the file in a checkpoint that holds the window; "" for none.
        shape: What makes windows comparable: world size, batch size, ...
        history: One row per closed window, see `history_row`.
    """

    window_seen: int = 0
    window_reused: bool = False
    batches: int | None = None
    pass_batches: int | None = None
    window_file: str = ""
    shape: dict[str, int] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state_dict: dict[str, Any]) -> "RunProgress":
        """The same again; keys that an older version did not write keep their defaults."""
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in state_dict.items() if k in known})

    def record(self, step: int, lr_sum: float, window: WindowRatio) -> None:
        """Keep a closed window in which noise was measured.

        Args:
            step: Optimizer steps at its end.
            lr_sum: Training time at its end.
            window: What was measured.
        """
        if not math.isnan(window.ratio):
            self.history.append(history_row(step, lr_sum, window, reused=self.window_reused))

    def last_measures(self) -> dict[str, float | None]:
        """F, C and U of the last window and their standard errors; empty before the first."""
        names = ("signal_ratio", "signal_ratio_se", *MEASURES)
        return {name: self.history[-1][name] for name in names} if self.history else {}

    def continue_with(self, pass_batches: int | None, drawn: int) -> None:
        """Count on in micro-batches of the present size.

        Args:
            pass_batches: Micro-batches of one pass over the data; None if unknown.
            drawn: How many were drawn, if this is not remembered.
        """
        before, self.pass_batches = self.pass_batches, pass_batches
        if self.batches is None:
            self.batches = drawn
        elif before and pass_batches and before != pass_batches:
            self.batches = self.batches * pass_batches // before

    def changes(self, shape: dict[str, int]) -> str:
        """What differs from the shape of the run so far, "" if nothing does.

        Example:
            >>> RunProgress(shape={"world size": 2}).changes({"world size": 1})
            'world size 2 -> 1'
        """
        names = [name for name in shape if self.shape.get(name, shape[name]) != shape[name]]
        return ", ".join(f"{name} {self.shape[name]} -> {shape[name]}" for name in names)

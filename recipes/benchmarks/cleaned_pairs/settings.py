"""Data and trainings that are compared: conditions, learning rates, numbers of pairs, seeds."""

from dataclasses import dataclass

from benchmarks.cleaned_pairs.training import Run

__all__ = ["CHOSEN_ON", "FRESH", "QUICK", "SELECTION", "SETTINGS", "STRUCTURED", "Setting"]

SELECTION, FRESH = (100, 101, 102), (0, 1, 2, 3, 4)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Members that train side by side: a data set for each condition and seed."""

    name: str
    conditions: tuple[str, ...]
    run: Run
    pairs: int = 960

    @property
    def key(self) -> str:
        """For files."""
        run = self.run
        return f"{self.name}_{self.pairs}_{run.lr:g}_{run.schedule}_{run.epochs}"


def _linear(lr: float) -> Run:
    return Run(lr=lr, schedule="linear", epochs=6)


FLIPS = ("flips 0", "flips 30")
SETTINGS = (
    *(Setting(name="flips", conditions=FLIPS, run=_linear(lr)) for lr in (1e-4, 3e-4, 1e-3, 3e-3)),
    Setting(name="flips", conditions=FLIPS, run=Run(lr=1e-3, schedule="constant", epochs=8)),
    *(Setting(name="few", conditions=FLIPS, run=_linear(lr), pairs=320) for lr in (3e-4, 1e-3)),
)
CHOSEN_ON = (
    *(Setting(name="flips", conditions=("flips 30",), run=_linear(lr)) for lr in (3e-4, 1e-3)),
    Setting(
        name="flips", conditions=("flips 30",), run=Run(lr=1e-3, schedule="constant", epochs=8)
    ),
)
STRUCTURED = tuple(
    Setting(name="structured", conditions=("length", "annotators"), run=_linear(lr))
    for lr in (3e-4, 3e-3)
)
QUICK = Setting(
    name="flips", conditions=FLIPS, run=Run(lr=1e-3, schedule="linear", epochs=2), pairs=96
)

"""Which arms and which charts the page has."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from playground_table import Run

__all__ = ["ARMS", "CHARTS", "MARKS", "Arm", "ChartKind"]


@dataclass(frozen=True)
class Arm:
    """An arm of the harness, as the page names and marks it; its line is in `playground.css`."""

    arm: str
    name: str
    mark: str


# Marks differ in size, so that one on another does not hide it.
ARMS = (
    Arm("AdamW", "AdamW", "M-3,0A3,3 0 1 0 3,0A3,3 0 1 0 -3,0Z"),
    Arm("soft-32", "gate (default)", "M-4.5,-4.5H4.5V4.5H-4.5Z"),
    Arm("norm(soft-32)", "AdamW, steps as short", "M0,-7L6.5,5H-6.5Z"),
    Arm("paper", "gate as published", "M0,-6.5L6.5,0L0,6.5L-6.5,0Z"),
)


@dataclass(frozen=True, kw_only=True)
class ChartKind:
    """One chart over epochs.

    Attributes:
        id: Prefix of the ids in it.
        title: Heading.
        note: Below it.
        of: The quantity of a run, from epoch `first` on, in units of 1 / `unit`.
        unit: 1000 for shares, 100 for F.
        low: Lower end of the vertical axis, in the same units.
        high: Its upper end.
        ticks: Of that axis.
        log: Whether it is logarithmic.
        mark: Share at the stop that a mark shows, or "".
    """

    id: str
    title: str
    note: str
    of: Callable[[Run], Sequence[float]]
    unit: int = 1000
    first: int = 0
    low: int = 0
    high: int = 1000
    ticks: Sequence[int] = (0, 250, 500, 750, 1000)
    log: bool = False
    mark: str = ""


CHARTS = (
    ChartKind(
        id="accuracy",
        title="Right answers on new images",
        note="500 held-out images with right labels. The axis starts at 40 %.",
        of=lambda run: run.accuracy,
        low=400,
        ticks=(400, 600, 800, 1000),
        mark="accuracy",
    ),
    ChartKind(
        id="wrong",
        title="Wrong labels learned by heart",
        note="Of the wrongly labelled training images, those answered with their wrong label. "
        "0 where no label is wrong.",
        of=lambda run: run.fitted_wrong,
        mark="fitted_wrong",
    ),
    ChartKind(
        id="right",
        title="Right labels fitted",
        note="Of the rightly labelled training images, those answered rightly. The axis starts "
        "at 40 %.",
        of=lambda run: run.fitted_right,
        low=400,
        ticks=(400, 600, 800, 1000),
        mark="fitted_right",
    ),
    ChartKind(
        id="open",
        title="Coordinates that move",
        note="Mean over the steps of an epoch: the gate's open fraction. Even AdamW does not "
        "reach 100 %, for some pixels are always blank.",
        of=lambda run: run.open,
        first=1,
    ),
    ChartKind(
        id="signal",
        title="Signal against noise, F",
        note="What the stop looks at: below 1, batches agree no more than noise does.",
        of=lambda run: [100 * ratio for ratio in run.ratio],
        unit=100,
        first=1,
        low=25,
        high=1600,
        ticks=(25, 50, 100, 200, 400, 800, 1600),
        log=True,
    ),
)
MARKS = [chart.mark for chart in CHARTS if chart.mark]

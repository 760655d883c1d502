"""The page: numbers and sentences of every setting, drawn by its script; one of them as a picture.

The picture is for readers without scripts.
"""

import base64
import hashlib
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from playground.sentences import findings, headline, result_row
from playground.table import Cell, Run, Runs, cell_of

from poprisk_integrations.cli.report.page import SCRIPT, STYLE

__all__ = ["page_of"]

HERE = Path(__file__).parent
LISTS = {"better": "Better here", "worse": "Worse here", "unclear": "Small, or not in all seeds"}
WORDS = {0: "careful", -1: "impatient"}
COLOURS = ("#0b60a8", "#b4400a", "#006f4e", "#7b35b8")  # of the picture; the page has its own


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
class Chart:
    """One chart over epochs, of the quantity `of` a run from epoch `first` on."""

    id: str
    title: str
    note: str
    of: Callable[[Run], Sequence[float]]
    unit: int = 1000  # 1000 for shares, 100 for F; the axis is in the same units
    first: int = 0
    ticks: Sequence[int] = (0, 250, 500, 750, 1000)
    log: bool = False
    mark: str = ""  # share at the stop that a mark shows


CHARTS = (
    Chart(
        id="accuracy",
        title="Right answers on new images",
        note="500 held-out images with right labels. The axis starts at 40 %.",
        of=lambda run: run.accuracy,
        ticks=(400, 600, 800, 1000),
        mark="accuracy",
    ),
    Chart(
        id="wrong",
        title="Wrong labels learned by heart",
        note="Of the wrongly labelled training images, those answered with their wrong label. "
        "0 where no label is wrong.",
        of=lambda run: run.fitted_wrong,
        mark="fitted_wrong",
    ),
    Chart(
        id="right",
        title="Right labels fitted",
        note="Of the rightly labelled training images, those answered rightly. The axis starts "
        "at 40 %.",
        of=lambda run: run.fitted_right,
        ticks=(400, 600, 800, 1000),
        mark="fitted_right",
    ),
    Chart(
        id="open",
        title="Coordinates that move",
        note="Mean over the steps of an epoch: the gate's open fraction. Even AdamW does not "
        "reach 100 %, for some pixels are always blank.",
        of=lambda run: run.open,
        first=1,
    ),
    Chart(
        id="signal",
        title="Signal against noise, F",
        note="What the stop looks at: below 1, batches agree no more than noise does.",
        of=lambda run: [100 * ratio for ratio in run.ratio],
        unit=100,
        first=1,
        ticks=(25, 50, 100, 200, 400, 800, 1600),
        log=True,
    ),
)
MARKS = [chart.mark for chart in CHARTS if chart.mark]


def page_of(runs: Runs, noise: int | None = None, lr: float | None = None) -> str:
    """The whole page; the setting shown first has 30 % and the largest rate unless given."""
    noises, lrs = (sorted({key[place] for key in runs}) for place in (1, 2))
    if noise is None:
        noise = 30 if 30 in noises else noises[len(noises) // 2]
    lr = lrs[-1] if lr is None else lr
    data = _data(runs, noises, lrs)
    row, chosen = noises.index(noise), lrs.index(lr)
    script = SCRIPT + (HERE / "playground.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        trim_blocks=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    return environment.get_template("playground.html.j2").render(
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "img-src data:; base-uri 'none'; form-action 'none'",
        style=Markup(STYLE + (HERE / "playground.css").read_text(encoding="utf-8")),
        script=Markup(script),
        data=Markup(json.dumps(data, separators=(",", ":")).replace("</", "<\\/")),
        arms=ARMS,
        charts=CHARTS,
        lists=LISTS,
        words={place % len(lrs): word for place, word in WORDS.items()},
        noises=noises,
        lrs=lrs,
        row=row,
        chosen=chosen,
        shown=data["settings"][row][chosen],
        seeds=len(next(iter(runs.values()))),
        picture=_picture(data, row, chosen),
    )


def _data(runs: Runs, noises: list[int], lrs: list[float]) -> dict[str, Any]:
    """What `playground.js` draws."""
    epochs = len(next(iter(runs.values()))[0].open)
    settings, lasts = [], []
    for noise in noises:
        cells = {
            (arm.arm, lr): cell_of(runs[arm.arm, noise, lr], noise) for arm in ARMS for lr in lrs
        }
        settings.append([_setting(runs, cells, noise, lr, epochs) for lr in lrs])
        lasts.append(
            [[int(10 * fmean(cells[arm.arm, lr].last) + 0.5) for lr in lrs] for arm in ARMS]
        )
    names = ("id", "title", "unit", "first", "ticks", "log")
    return {
        "noises": noises,
        "rates": [f"{lr:g}" for lr in lrs],
        "epochs": epochs,
        "arms": [{"name": arm.name, "mark": arm.mark} for arm in ARMS],
        "charts": [
            {name: getattr(chart, name) for name in names}
            | {"mark": MARKS.index(chart.mark) + 1 if chart.mark else 0}
            for chart in CHARTS
        ],
        "lasts": lasts,
        "settings": settings,
    }


def _setting(
    runs: Runs, cells: Mapping[tuple[str, float], Cell], noise: int, lr: float, epochs: int
) -> dict[str, Any]:
    found = findings(cells, noise, lr, epochs)
    return {
        "name": _unbroken(f"{noise} % wrong labels, learning rate {lr:g}"),
        "headline": _unbroken(headline(cells, lr, epochs)),
        **{kind: [_unbroken(f.text) for f in found if f.kind == kind] for kind in LISTS},
        "results": [result_row(cells[arm.arm, lr], noise) for arm in ARMS],
        "arms": [_numbers(runs[arm.arm, noise, lr], noise) for arm in ARMS],
    }


def _unbroken(text: str) -> str:
    """A per cent sign stays with its number."""
    return text.replace(" %", "\u00a0%")


def _numbers(runs: Sequence[Run], noise: int) -> dict[str, Any]:
    """An arm in a setting: by chart means, distances to lowest and highest; the stop's marks."""
    found: dict[str, Any] = {}
    for chart in CHARTS:
        columns = list(zip(*(chart.of(run) for run in runs), strict=True))
        means = [_rounded(fmean(column)) for column in columns]
        found[chart.id] = [
            means,
            [m - _rounded(min(c)) for m, c in zip(means, columns, strict=True)],
            [_rounded(max(c)) - m for m, c in zip(means, columns, strict=True)],
        ]
    epoch = cell_of(runs, noise).middle_stop
    shares = [_rounded(fmean(run.at_stop(name) for run in runs)) for name in MARKS]
    found["stop"] = None if epoch is None else [epoch, *shares]
    return found


def _rounded(value: float) -> int:
    return math.floor(value + 0.5)


def _picture(data: Mapping[str, Any], row: int, chosen: int) -> str:
    """The charts of one setting as a PNG, in the text of an address."""
    arms = data["settings"][row][chosen]["arms"]
    figure = Figure(figsize=(11.0, 6.2), dpi=64, layout="constrained")
    axes = figure.subplots(2, 3).flat
    for chart, axis in zip(CHARTS, axes, strict=False):
        for arm, values, colour in zip(ARMS, arms, COLOURS, strict=True):
            means = [mean / chart.unit for mean in values[chart.id][0]]
            epochs = range(chart.first, chart.first + len(means))
            axis.plot(epochs, means, color=colour, label=arm.name)
            if chart.mark and values["stop"]:
                epoch, *shares = values["stop"]
                axis.plot(epoch, shares[MARKS.index(chart.mark)] / 1000, "o", color=colour)
        axis.set_title(chart.title, fontsize=9)
        axis.set_xlabel("epoch")
        axis.set_xscale("function", functions=(lambda x: abs(x) ** 0.5, lambda x: x**2))
        axis.set_yscale("log" if chart.log else "linear")
        axis.set_ylim(chart.ticks[0] / chart.unit, chart.ticks[-1] / chart.unit)
        axis.grid(alpha=0.3)
    *_, last = figure.axes
    for arm, values, colour in zip(ARMS, data["lasts"][row], COLOURS, strict=True):
        shares = [value / 1000 for value in values]
        last.plot(data["rates"], shares, "o-", color=colour, label=arm.name)
    last.set_title("Right answers at the last epoch, by learning rate", fontsize=9)
    last.set_ylim(0.4, 1.0)
    last.grid(alpha=0.3)
    handles, labels = last.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(ARMS), frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"

"""What a setting shows, in sentences made from its numbers: what is better, worse, and neither."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from playground.table import Cell

__all__ = ["Comparison", "Finding", "compare", "findings", "headline", "result_row"]

Kind = Literal["better", "worse", "unclear"]
SMALLEST = 0.5  # points
# What is known of one share of wrong labels: (arm, learning rate) -> cell.
Cells = Mapping[tuple[str, float], Cell]


@dataclass(frozen=True)
class Finding:
    """A sentence, and which list it belongs to."""

    kind: Kind
    text: str


@dataclass(frozen=True)
class Comparison:
    """Ours against theirs, paired by seed."""

    points: float  # mean difference, positive where ours is ahead
    ahead: int  # seeds in which ours is ahead
    behind: int  # seeds in which it is behind
    seeds: int  # all of them

    @property
    def kind(self) -> Kind:
        """Better or worse only if all seeds say so, and by `SMALLEST` points."""
        if self.points >= SMALLEST and self.ahead == self.seeds:
            return "better"
        if self.points <= -SMALLEST and self.behind == self.seeds:
            return "worse"
        return "unclear"

    def against(self, whom: str) -> str:
        """In words, e.g. "1.5 points above AdamW"."""
        if abs(self.points) < SMALLEST:
            return f"level with {whom} ({round(self.points, 1) + 0.0:+.1f} points)"  # never -0.0
        agree, side = (self.ahead, "above") if self.points > 0 else (self.behind, "below")
        some = "" if agree == self.seeds else f" on average, in {agree} of {self.seeds} seeds"
        return f"{abs(self.points):.1f} points {side} {whom}{some}"


def compare(ours: Sequence[float], theirs: Sequence[float]) -> Comparison:
    """Who is ahead, by percentages of the same seeds."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    return Comparison(
        points=fmean(differences),
        ahead=sum(d > 0 for d in differences),
        behind=sum(d < 0 for d in differences),
        seeds=len(differences),
    )


def headline(cells: Cells, lr: float, epochs: int) -> str:
    """A setting in a few sentences."""
    adam, gate = cells["AdamW", lr], cells["soft-32", lr]
    middle, count = adam.middle_stop, len(adam.last)
    best = f"its best epoch, {adam.best_epoch}, had {_percent(adam.best)}"
    if not adam.stop_epochs:
        stop = f"The stop lets all {count} runs of AdamW go on to epoch {epochs}; {best}."
    elif middle is None:
        some = f"{len(adam.stop_epochs)} of {count}"
        stop = f"The stop ends {some} runs of AdamW before epoch {epochs}; {best}."
    else:
        stop = (
            f"The stop would have ended AdamW in epoch {middle}, at {_percent(adam.stopped)}; "
            f"{best}."
        )
    text = (
        f"AdamW ends with {_percent(adam.last)} of new images right, the gate with "
        f"{_percent(gate.last)}. {stop}"
    )
    best = _best_rate(cells, "AdamW")
    if best != lr:
        text += f" At learning rate {best:g} AdamW ends with {_percent(cells['AdamW', best].last)}."
    return text


def findings(cells: Cells, noise: int, lr: float, epochs: int) -> list[Finding]:
    """Everything the page says about a setting."""
    return [
        _gate(cells, noise, lr),
        _short_steps(cells, lr),
        *_rates(cells, lr),
        _peaks(cells, lr),
        _stop(cells["AdamW", lr], "AdamW", noise, epochs),
        _stop(cells["soft-32", lr], "the gate's run", noise, epochs),
        _published(cells, noise, lr),
    ]


def result_row(cell: Cell, noise: int) -> list[str]:
    """Cells of the table of results: accuracies, the stop, what was learned."""
    never = len(cell.last) - len(cell.stop_epochs)
    stops = _span(cell.stop_epochs)
    if never:
        stops = f"{stops}, {never} never" if stops else "never"
    learned = [f"{cell.learned:.1f} %", f"{cell.learned_stopped:.1f} %"] if noise else ["-", "-"]
    return [
        _percent(cell.last),
        f"{_percent(cell.best)} ({cell.best_epoch})",
        _percent(cell.stopped),
        stops,
        *learned,
        f"{cell.fitted:.1f} %",
        f"{cell.fitted_stopped:.1f} %",
    ]


def _gate(cells: Cells, noise: int, lr: float) -> Finding:
    adam, gate = cells["AdamW", lr], cells["soft-32", lr]
    found = compare(gate.last, adam.last)
    text = f"At the last epoch the gate is {found.against('AdamW')}."
    if noise:
        text += (
            f" It has learned {gate.learned:.0f} % of the wrong labels by heart, "
            f"AdamW {adam.learned:.0f} %."
        )
    return Finding(found.kind, text)


def _short_steps(cells: Cells, lr: float) -> Finding:
    adam, gate, short = (cells[arm, lr] for arm in ("AdamW", "soft-32", "norm(soft-32)"))
    found, gain = compare(gate.last, short.last), compare(gate.last, adam.last)
    text = (
        f"AdamW with steps as short as the gate's ends at {_percent(short.last)}: the gate is "
        f"{found.against('it')}."
    )
    if gain.points >= SMALLEST and found.points >= SMALLEST:
        text += (
            f" Of the gate's {gain.points:.1f} points over AdamW, the shorter step makes "
            f"{max(gain.points - found.points, 0.0):.1f}."
        )
    elif gain.points >= SMALLEST:
        text += " What the gate gains over AdamW, the shorter step gains too."
    return Finding(found.kind, text)


def _best_rate(cells: Cells, arm: str) -> float:
    """With the highest accuracy at the last epoch; the smallest of equals."""
    rates = sorted(rate for name, rate in cells if name == arm)
    return max(rates, key=lambda rate: fmean(cells[arm, rate].last))


def _rates(cells: Cells, lr: float) -> list[Finding]:
    best = {arm: _best_rate(cells, arm) for arm in ("AdamW", "soft-32", "norm(soft-32)")}
    adam, gate, short = (cells[arm, rate] for arm, rate in best.items())
    texts = []
    rate = best["AdamW"]
    if rate != lr:
        found = compare(cells["soft-32", lr].last, adam.last)
        texts.append(
            Finding(
                found.kind,
                f"A {'smaller' if rate < lr else 'larger'} learning rate alone, {rate:g}, takes "
                f"AdamW to {_percent(adam.last)} at the last epoch. The gate at {lr:g} is "
                f"{found.against('that')}.",
            )
        )
    found = compare(gate.last, adam.last)
    texts.append(
        Finding(
            found.kind,
            f"Each at its best of these rates, last epoch: gate {_percent(gate.last)} "
            f"({best['soft-32']:g}), AdamW {_percent(adam.last)} ({rate:g}), AdamW with steps as "
            f"short {_percent(short.last)} ({best['norm(soft-32)']:g}). The gate is "
            f"{found.against('AdamW')}.",
        )
    )
    return texts


def _peaks(cells: Cells, lr: float) -> Finding:
    adam, gate = cells["AdamW", lr], cells["soft-32", lr]
    found = compare(gate.best, adam.best)
    return Finding(
        found.kind,
        f"At the peak of its curve the gate has {_percent(gate.best)} (epoch {gate.best_epoch}), "
        f"AdamW {_percent(adam.best)} (epoch {adam.best_epoch}). The gate is "
        f"{found.against('AdamW')}.",
    )


def _stop(cell: Cell, whose: str, noise: int, epochs: int) -> Finding:
    count, stops = len(cell.last), cell.stop_epochs
    if not stops:
        return Finding("unclear", f"The stop lets {whose} go on to epoch {epochs} in all seeds.")
    found, short = compare(cell.stopped, cell.last), compare(cell.stopped, cell.best)
    where = f"in {'epoch' if stops[0] == stops[-1] else 'epochs'} {_span(stops)}"
    if len(stops) < count:
        where += f" in {len(stops)} of {count} seeds"
    text = (
        f"The stop ends {whose} {where}, at {_percent(cell.stopped)}. That is "
        f"{found.against('its last epoch')}, and {abs(short.points):.1f} "
        f"{'above' if short.points > 0 else 'below'} its best one, which nobody knows without "
        "clean labels."
    )
    if noise:
        text += (
            f" By then {cell.learned_stopped:.0f} % of the wrong labels are learned, at the end "
            f"{cell.learned:.0f} %."
        )
    return Finding(found.kind, text)


def _published(cells: Cells, noise: int, lr: float) -> Finding:
    adam, paper = cells["AdamW", lr], cells["paper", lr]
    found = compare(paper.last, adam.last)
    wrong = f" and {paper.learned:.0f} % of the wrong ones ({adam.learned:.0f} %)" if noise else ""
    return Finding(
        found.kind,
        f"The gate as published ends at {_percent(paper.last)}, {found.against('AdamW')}. It fits "
        f"{paper.fitted:.0f} % of the right labels (AdamW {adam.fitted:.0f} %){wrong}.",
    )


def _span(epochs: Sequence[int]) -> str:
    if not epochs:
        return ""
    return str(epochs[0]) if epochs[0] == epochs[-1] else f"{epochs[0]} to {epochs[-1]}"


def _percent(values: Sequence[float]) -> str:
    return f"{fmean(values):.1f} %"

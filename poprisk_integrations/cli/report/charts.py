"""The charts of a page: one table of what runs log and measure, and how its rows are read."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from poprisk_integrations.cli.report.run import (
    Key,
    Run,
    finite,
    natural,
    parse_key,
    plain,
    short,
    shown,
)

__all__ = ["RATES", "Chart", "Line", "Section", "matching", "sections_of"]

LOSSES = r"(?!poprisk/)(.*[_/ ])?loss"
RATES = r"learning_rate|lr|lr-.*"  # of Trainer, and of Lightning's LearningRateMonitor
NORMS = r"grad(ient)?_(.*_)?norm(_total)?"  # of Trainer, and Lightning's grad_2.0_norm_total
# Of time and progress, not of training; and marks of other charts.
_NOT_SHOWN = (
    "epoch", "global_step", "model_preparation_time", "num_input_tokens_seen", "num_tokens",
    "runtime", "samples_per_second", "steps_per_second", "tokens_per_second", "total_flos",
    "poprisk/onset_step", "poprisk/predicted_stop_step",
)  # fmt: skip
_MOST_OTHERS = 18  # charts of what no other section shows
_MOST_GROUPS = 6  # lines that can still be told apart
_MOST_STACKED = 4  # groups with areas of their own, where there is no total
_Z90 = 1.645  # standard errors on both sides of a band that covers 90 %


@dataclass(frozen=True)
class Quantity:
    """A row of the table: what becomes a chart where it was logged or measured."""

    section: str
    title: str
    names: Mapping[str, str]  # patterns of logged names -> legend; "" for the logged name itself
    note: str = ""  # below the chart
    bounds: tuple[float, float] | None = None  # of the vertical axis
    log: bool = False  # the vertical axis may be logarithmic
    hold: bool = False  # a value holds until the next point
    stacked: bool = False  # the lines are areas on top of each other
    read: "Callable[[Sequence[Run], Quantity], Iterator[Chart]] | None" = None  # else `_logged`
    band: Sequence[str] = ()  # logged names of the ends of a band
    level: str = ""  # a horizontal line, "zero" or "threshold"; the band is then a standard error
    most: int = 100  # names
    apart: bool = False  # each name has a chart of its own
    unless: str = ""  # a logged name that is drawn instead


@dataclass(frozen=True)
class Line:
    """One line with its band, or one area of a stacked chart."""

    what: str  # the quantity, as "eval" or "p10"; may be "" where there is one
    curve: pd.Series
    run: int = 0  # which gives the colour where there are several runs
    style: int = 0  # which gives the dash pattern; and the colour where there is one run
    low: pd.Series | None = None
    high: pd.Series | None = None


@dataclass
class Chart:
    """A chart over optimizer steps."""

    of: Quantity  # with the chart's own title and note
    runs: Sequence[Run]
    lines: Sequence[Line]
    level: tuple[float, str] | None = None  # a horizontal line, and its label
    last_step: float = 0.0  # where the horizontal axis ends, the same for all charts of a page

    @property
    def is_compared(self) -> bool:
        """Whether the colours tell runs apart."""
        return len(self.runs) > 1

    def label(self, line: Line) -> str:
        """Names of run and quantity."""
        names = (self.runs[line.run].label if self.is_compared else "", line.what)
        return ", ".join(filter(None, names))

    @property
    def marks(self) -> list[tuple[str, float, int]]:
        """What happened, at which step, in which run.

        The best window or the onset, and when training stopped; where it has not, when it would.
        """
        marks = []
        for index, run in enumerate(self.runs):
            stop = run.stop
            if stop is None or stop.criterion == "signal":
                onset = run.last("poprisk/onset_step") if stop is None else stop.onset_at
                found = {"onset": onset, "stop": None if stop is None else stop.stop_step}
                if onset is not None and found["stop"] is None:
                    found["predicted stop"] = run.last("poprisk/predicted_stop_step")
            elif stop.cooldown_step is None:
                found = {"best window": stop.best_step, "stop": stop.stop_step}
            else:  # which begins where the run would have been stopped
                found = {"best window": stop.best_step, "cooldown": stop.cooldown_step}
            marks += [(kind, step, index) for kind, step in found.items() if step is not None]
        return marks


@dataclass
class Section:
    """Charts under a heading, and paragraphs after them."""

    name: str
    title: str
    charts: list[Chart] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def sections_of(runs: Sequence[Run]) -> list[Section]:
    """All sections; one without content has no charts and no remarks."""
    sections = {name: Section(name, title) for name, title in _SECTIONS.items()}
    drawn = {*_NOT_SHOWN}
    for quantity in _TABLE:
        found = _found(runs, quantity)
        drawn |= {name for one in found for name in (*one.names, *one.band)}
        drawn |= {f"{name}_se" for name in quantity.names}
        if not quantity.unless or not any(run.family(quantity.unless) for run in runs):
            sections[quantity.section].charts += [c for one in found for c in _charts_of(runs, one)]
    _add_others(runs, [n for n in matching(runs, ".*") if n not in drawn], sections["other"])
    charts = [chart for section in sections.values() for chart in section.charts]
    ends = [line.curve.index[-1] for chart in charts for line in chart.lines]
    ends += [step for chart in charts for _, step, _ in chart.marks]
    for chart in charts:
        chart.last_step = max(ends)
    return list(sections.values())


def matching(runs: Sequence[Run], pattern: str) -> list[str]:
    """Logged quantities of a pattern, "loss" itself first."""
    bases = {parse_key(name).base for run in runs for name in run.curves}
    found = [base for base in bases if re.fullmatch(pattern, base, re.DOTALL)]
    return sorted(found, key=lambda base: (base != "loss", base))


def _found(runs: Sequence[Run], of: Quantity) -> list[Quantity]:
    """A row of the table with the names that were logged; one for each where they stand apart."""
    names = [(name, what) for p, what in of.names.items() for name in matching(runs, p)][: of.most]
    if of.apart:
        titles = {name: of.title if name == "loss" else f"{of.title}: {name}" for name, _ in names}
        return [replace(of, title=title, names={name: ""}) for name, title in titles.items()]
    return [replace(of, names={n: what or ("" if len(names) == 1 else n) for n, what in names})]


def _charts_of(runs: Sequence[Run], of: Quantity) -> list[Chart]:
    return [chart for chart in (of.read or _logged)(runs, of) if chart.lines]


def _add_others(runs: Sequence[Run], names: Sequence[str], section: Section) -> None:
    """What no other section shows, this package's own first. A constant is no chart."""
    constants, left_out = [], []
    for name in sorted(names, key=lambda name: (not name.startswith("poprisk/"), name)):
        values = pd.concat([finite(curve) for run in runs for _, curve in run.family(name)])
        if values.nunique() == 1:
            constants.append(f"{plain(name)} = {shown(values.iloc[0])}")
        elif values.size:
            one = Quantity("other", short(plain(name), 60), {name: ""})
            found = _charts_of(runs, one)
            if name.startswith("poprisk/"):
                found += _charts_of(runs, replace(one, read=_grouped))
            if len(section.charts) + len(found) <= _MOST_OTHERS:
                section.charts += found
            else:
                left_out.append(plain(name))
    if constants:
        section.remarks.append(f"Never changed: {', '.join(constants)}.")
    if left_out:
        section.remarks.append(f"Also logged, not drawn: {', '.join(left_out)}.")


# The readers: each makes the charts of one row of the table, whose names are logged ones.


def _logged(runs: Sequence[Run], of: Quantity) -> Iterator[Chart]:
    """Curves over all parameters, of each split; what windows measured, also of each callback."""
    found = [
        (index, name, key, curve)
        for index, run in enumerate(runs)
        for name in of.names
        for key, curve in run.family(name)
        if finite(curve).size and (of.level or not key.group)
    ]
    num_splits = len({key.split for _, _, key, _ in found})

    def what_of(name: str, key: Key) -> str:
        if key.group:
            return f"callback {key.group}"
        split = key.split if num_splits > 1 or not of.names[name] else ""
        quantity = of.names[name] if len(of.names) > 1 or len(runs) == 1 else ""
        kind = f"({key.kind})" if key.kind else ""
        return " ".join(filter(None, (split, quantity, kind)))

    whats = list(dict.fromkeys(what_of(name, key) for _, name, key, _ in found))
    is_named = len(whats) > 1 or len(runs) == 1
    lines = []
    for index, name, key, curve in found:
        run, what = runs[index], what_of(name, key)
        ends = [run.curve(end, key.split).reindex(curve.index) for end in of.band]
        if of.level:
            errors = run.errors(name, key.group)
            # F cannot be negative, and its axis is logarithmic.
            floor = np.minimum(curve, 1e-3) if of.log else -np.inf
            ends = [np.maximum(curve - errors, floor), curve + errors]
        lines.append(Line(what if is_named else "", curve, index, whats.index(what), *ends))
    level = (0.0, of.level) if of.level else None
    if of.level == "threshold":
        thresholds = {run.stop.threshold for run in runs if run.stop is not None} or {1.0}
        level = (thresholds.pop(), of.level) if len(thresholds) == 1 else None
    yield Chart(of, runs, lines, level)


def _estimated(runs: Sequence[Run], of: Quantity) -> Iterator[Chart]:
    """The test loss, and each metric of examples: estimated beside trained on and held out."""
    start = "poprisk/estimated_test_"
    names = [name for name in of.names if name.startswith(start) and not name.endswith("_se")]
    for base in sorted(names, key=lambda base: base != f"{start}loss"):
        name = base.removeprefix(start)
        lines = []
        for index, run in enumerate(runs):
            family = run.family(name)
            estimate, errors = run.curve(base), _Z90 * run.errors(base)
            train = run.curve(f"poprisk/train_{name}")
            if train.empty:  # the run goes on: what it has logged
                so_far = [c for k, c in family if k.split == "train" and k.kind != "step"]
                train = finite(so_far[0]) if so_far else train
            held_out = [curve for key, curve in family if key.split == "eval"][:1]
            lines += [Line("training", train, index, 0)]
            lines += [
                Line("estimated test", estimate, index, 1, estimate - errors, estimate + errors)
            ]
            lines += [Line("held out", curve, index, 2) for curve in held_out]
        title = f"Estimated test {plain(name).replace('_', ' ')}"
        yield Chart(replace(of, title=title), runs, [line for line in lines if line.curve.size])


def _grouped(runs: Sequence[Run], of: Quantity) -> Iterator[Chart]:
    """By parameter group, a chart for each run; of many groups a few, evenly spaced."""
    for name in of.names:
        for run in runs:
            found = {key.group: curve for key, curve in run.family(name) if key.group}
            groups = sorted((g for g in found if finite(found[g]).size), key=natural)
            places = np.linspace(0, len(groups) - 1, min(len(groups), _MOST_GROUPS))
            drawn = [groups[round(place)] for place in places]
            lines = [Line(short(plain(g)), found[g], 0, style) for style, g in enumerate(drawn)]
            one = replace(of, title=_title_of_run(f"{of.title} by parameter group", run, runs))
            if len(drawn) < len(groups):
                note = f"{len(drawn)} of {len(groups)} groups; the table has all."
                one = replace(one, note=note)
            yield Chart(one, [run], lines)


def _closed(runs: Sequence[Run], of: Quantity) -> Iterator[Chart]:
    """Shares of closed coordinates by reason; by parameter group only where there is no total."""
    for run in runs:
        groups = {k.group for n in of.names for k, _ in run.family(n) if k.split == "train"}
        for group in [""] if "" in groups else sorted(groups, key=natural)[:_MOST_STACKED]:
            curves = {what: run.curve(name, group=group) for name, what in of.names.items()}
            curves = {what: curve for what, curve in curves.items() if curve.size}
            both = pd.DataFrame(curves).dropna()
            lines = [Line(what, both[what], 0, style) for style, what in enumerate(both)]
            title = _title_of_run(f"{of.title}, {plain(group)}" if group else of.title, run, runs)
            yield Chart(replace(of, title=title), [run], lines if both.size else [])


def _title_of_run(title: str, run: Run, runs: Sequence[Run]) -> str:
    return f"{title}, {run.label}" if len(runs) > 1 else title


_SECTIONS = {
    "risk": "Estimated test loss",
    "loss": "Loss and learning rate",
    "stop": "Signal and noise",
    "gate": "Gate",
    "labels": "Preferences and wrong labels",
    "other": "Other logged values",
}
_SHARE = (0.0, 1.0)
_RANKED = "Pairs that are ranked as labelled, wrong labels included; ties {}."
_OF_GATE = {
    "Open fraction": "poprisk/open_fraction",
    "Mean gate": "poprisk/mean_gate",
    "Update norm, gated / ungated": "poprisk/update_norm_ratio",
}
_TABLE = (
    Quantity(
        "risk", "Estimated test loss", {r"poprisk/(estimated|train)_.*": ""},
        "One point per window, at its middle; the band covers 90 %. "
        "The weights of the best window are those at its end.",
        read=_estimated, log=True,
    ),
    Quantity("loss", "Loss", {LOSSES: ""}, log=True, most=6, apart=True),
    Quantity("loss", "Learning rate", {RATES: ""}),
    Quantity("loss", "Gradient norm", {NORMS: ""}, log=True, most=1),
    Quantity(
        "stop", "How far batches agree (F)", {"poprisk/signal_ratio": "F"},
        "One point per window, at its middle. At 1 the batches agree on a direction as far as "
        "chance alone would have them; only below the threshold is nothing left in common. "
        "The band is one standard error.",
        level="threshold", log=True,
    ),
    Quantity(
        "stop", "Gain of the last step (C)", {"poprisk/risk_decrease": "C"},
        "First-order gain of repeating the last step on fresh batches. "
        "The band is one standard error.",
        level="zero",
    ),
    Quantity(
        "stop", "Agreement of consecutive batches (U)", {"poprisk/agreement": "U"},
        "Product of consecutive gradients; near 0 they agree no more than noise does. "
        "The band is one standard error.",
        level="zero",
    ),
    *(Quantity("gate", title, {name: ""}, bounds=_SHARE) for title, name in _OF_GATE.items()),
    Quantity(
        "gate", "Effective learning rate", {"poprisk/effective_lr": ""},
        "Learning rate times the norm ratio.",
    ),
    Quantity(
        "gate", "Why coordinates are closed",
        {"poprisk/closed_noise": "noise", "poprisk/closed_zero_grad": "zero gradient"},
        "Shares of all coordinates; what is left above the areas is open.",
        bounds=_SHARE, stacked=True, read=_closed,
    ),
    *(
        Quantity("gate", title, {name: ""}, bounds=_SHARE, read=_grouped)
        for title, name in _OF_GATE.items()
    ),
    Quantity(
        "labels", "Reward accuracy", {"poprisk/reward_accuracy": ""}, _RANKED.format("count half"),
        bounds=_SHARE,
    ),
    Quantity(
        "labels", "Reward accuracy", {"rewards/accuracies": ""}, _RANKED.format("count as wrong"),
        bounds=_SHARE, unless="poprisk/reward_accuracy",
    ),
    Quantity(
        "labels", "Reward margins", {"poprisk/margin_p10": "p10", "poprisk/margin_p50": "p50"},
        "Quantiles over the pairs since the last log line: a tenth (p10) and half (p50) of them "
        "have a smaller margin.",
    ),
    Quantity(
        "labels", "Margins of clean and of suspect pairs",
        {
            "poprisk/margin_p10_clean": "p10 clean",
            "poprisk/margin_p50_clean": "p50 clean",
            "poprisk/margin_p10_suspect": "p10 suspect",
            "poprisk/margin_p50_suspect": "p50 suspect",
        },
        "A pair is suspect if its label is more probably wrong than right.",
    ),
    Quantity(
        "labels", "Suspect pairs fitted", {"poprisk/flips_fitted": ""},
        "Share of the suspect pairs that are ranked as labelled: near 1 wrong labels are "
        "memorised.",
        bounds=_SHARE,
    ),
    Quantity(
        "labels", "Drift on the data (kl_data)", {"poprisk/kl_data": ""},
        "Mean log-ratio of policy to reference on the completions of the data. It is not the KL "
        "divergence, which is a mean over the policy's own samples: it can be negative, and falls "
        "while the policy moves away from the data's completions.",
    ),
    Quantity(
        "labels", "KL divergence (kl_on_policy)", {"poprisk/kl_on_policy": ""},
        "Policy to reference, on the policy's own samples.",
    ),
    Quantity(
        "labels", "Estimated noise rate", {"poprisk/noise_rate": ""},
        "Share of wrong labels; the band is the 95 % interval. Where that is wider than 0.25 the "
        "margins do not tell a rate, and the line is only what fits best. Estimated in the middle "
        "and at the end of the first epoch, and held.",
        bounds=(0.0, 0.5), hold=True, band=("poprisk/noise_rate_low", "poprisk/noise_rate_high"),
    ),
    Quantity(
        "labels", "Suspected flips", {"poprisk/flips_suspected": ""},
        "Pairs whose label is more probably wrong than right.", hold=True,
    ),
)  # fmt: skip

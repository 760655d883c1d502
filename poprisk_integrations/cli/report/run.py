"""One run: what is known of it, and its numbers, names and texts made fit to be shown."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from poprisk_integrations.core import Diagnosis

if TYPE_CHECKING:
    from poprisk_integrations.cli.report.cleaning import Cleaning

__all__ = [
    "MOST_PAIRS",
    "NOTHING",
    "Key",
    "Run",
    "Stop",
    "Suspects",
    "curve_of",
    "finite",
    "floating",
    "natural",
    "number",
    "parse_key",
    "plain",
    "short",
    "shown",
]

MOST_PAIRS = 20  # that a page lists, the most suspect ones
NOTHING = "-"  # stands for a number that is not known
# Controls and lone surrogates fit no page; marks that turn the writing direction make text lie.
_UNFIT = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
_SPLITS = {
    "train": "train", "eval": "eval", "val": "eval", "valid": "eval", "validation": "eval",
    "test": "test",
}  # fmt: skip
_SPLIT = re.compile(rf"({'|'.join(_SPLITS)})[_/](?=.)", re.DOTALL)


def plain(value: Any) -> str:
    r"""Text on one line without control characters; the page escapes what HTML means by it.

    Example:
        >>> plain("a\tb\n <c>\x00")
        'a b <c>\ufffd'
    """
    return _UNFIT.sub("\ufffd", " ".join(str(value).split()))


def short(text: str, length: int = 28) -> str:
    """Text with its middle left out where it is too long.

    Example:
        >>> short("a-very-long-name-of-a-run", 11)
        'a-ver…a-run'
    """
    head = (length - 1) // 2
    return text if len(text) <= length else f"{text[:head]}…{text[head + 1 - length :]}"


def floating(value: Any) -> float | None:
    """A number, which may be NaN or infinite, or None for anything else.

    Example:
        >>> floating(10**400), floating("3"), floating(True)
        (inf, None, None)
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(str(value)) if is_number else None  # by its digits: an integer may be too large


def number(value: Any) -> float | None:
    """A finite number, or None for anything else.

    Example:
        >>> number(3), number(math.nan), number("3")
        (3.0, None, None)
    """
    found = floating(value)
    return found if found is not None and math.isfinite(found) else None


def shown(value: float | None, digits: int = 4) -> str:
    """A number for people; a dash for none.

    Example:
        >>> shown(0.123456), shown(12000.0), shown(None)
        ('0.1235', '12000', '-')
    """
    if value is None:
        return NOTHING
    is_count = float(value).is_integer() and abs(value) < 1e15
    return f"{value:.0f}" if is_count else f"{value:.{digits}g}"


def natural(text: str) -> list[tuple[int, str]]:
    """Sort key by which group2 comes before group10.

    Example:
        >>> sorted(["group10", "group2"], key=natural)
        ['group2', 'group10']
    """
    parts = re.split(r"(\d+)", text)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


@dataclass(frozen=True)
class Key:
    """A logged name in parts."""

    base: str  # the quantity, as "loss" or "poprisk/open_fraction"
    split: str = "train"  # or "eval", or "test"
    group: str = ""  # of parameters, as "group0"; "" for all of them
    kind: str = ""  # "step" or "epoch" where Lightning logs both


@cache
def parse_key(name: str) -> Key:
    """Take a logged name apart.

    Example:
        >>> parse_key("val_loss_epoch")
        Key(base='loss', split='eval', group='', kind='epoch')
        >>> parse_key("eval_poprisk/kl_data").base
        'poprisk/kl_data'
        >>> parse_key("poprisk/layers/0/open_fraction")
        Key(base='poprisk/open_fraction', split='train', group='layers/0', kind='')
    """
    prefix = _SPLIT.match(name)
    base = name[prefix.end() :] if prefix else name
    split = _SPLITS[prefix[1]] if prefix else "train"
    if base.startswith("poprisk/"):
        *groups, last = base.removeprefix("poprisk/").split("/")
        return Key(f"poprisk/{last}", split, "/".join(groups))
    kind = next((k for k in ("step", "epoch") if base.endswith(f"_{k}")), "")
    return Key(base.removesuffix(f"_{kind}") if kind else base, split, "", kind)


def curve_of(points: Mapping[float, float]) -> pd.Series:
    """Logged values over ascending steps; NaN and infinities stay, as gaps."""
    return pd.Series(dict(sorted(points.items())), dtype=float)


def finite(curve: pd.Series) -> pd.Series:
    """A curve without NaN and infinities."""
    return curve[np.isfinite(curve)]


@dataclass(frozen=True, kw_only=True)
class Stop:
    """What the rule saw and decided, whichever framework wrote it."""

    criterion: str  # "risk" (the estimated test loss) or "signal" (F), by what was measured
    reason: str
    stopped: bool  # ended the run; a monitor has a `stop_step` only
    stop_step: float | None
    best_step: float | None
    cooldown_step: float | None
    onset_step: float | None
    onset_at: float | None  # where F, drawn at the middles of its windows, crossed the threshold
    threshold: float
    diagnosis: Diagnosis
    best: str  # checkpoint that was kept
    settings: Mapping[str, Any]
    windows: pd.DataFrame  # a row per window at its middle, since a window is of all its steps

    @property
    def verdict(self) -> str:
        """The reason, and how surely the windows say so."""
        return self.reason if self.windows.empty else f"{self.reason}; {self.diagnosis}"


@dataclass(frozen=True, kw_only=True)
class Suspects:
    """A flip report."""

    pairs: pd.DataFrame  # those with a probability, the most suspect first
    num_pairs: int  # all of them
    actions: Mapping[str, int]  # how often each is suggested
    calibrated: bool  # else the probabilities are a ranking alone
    num_swapped: int | None  # on purpose; None if the run was no such study
    # By annotator and by length, where the data were named: see `group_pairs` of `poprisk flips`.
    groups: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    command: str = ""  # shows and cleans the data; that without --dataset where it is empty
    directory: Path | None = None  # where the report lies

    @property
    def likely(self) -> pd.DataFrame:
        """Pairs that are more probably wrong than right; none where that is not known."""
        return self.pairs[(self.pairs["probability_wrong"] >= 0.5) & self.calibrated]


@dataclass(kw_only=True)
class Run:
    """All that is known of a run."""

    name: str
    directory: Path
    label: str = ""  # the name in legends of several runs
    # Logged name -> values over steps. What the windows of a stop measured stands here under the
    # names by which it is logged, and "poprisk/train_loss" is the training loss of a window.
    curves: dict[str, pd.Series] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=dict)  # of the whole run: `train_runtime`
    last_step: int | None = None
    planned_steps: int | None = None
    report: dict[str, Any] | None = None  # content of `poprisk_stop.json`
    report_path: Path | None = None
    stop: Stop | None = None  # the same, or what the trainer's state says while the run goes on
    # Content of `poprisk_noise.json`; of what was cleaned the estimate that it was cleaned by.
    noise: Mapping[str, Any] = field(default_factory=dict)
    suspects: Suspects | None = None
    cleaning: "Cleaning | None" = None  # what `poprisk clean` did
    settings: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)  # those that were read
    notes: list[str] = field(default_factory=list)  # what a reader should know of the logs

    def family(self, base: str) -> list[tuple[Key, pd.Series]]:
        """All curves of a quantity: of each split, of all parameters and of groups, in order."""
        splits = list(dict.fromkeys(_SPLITS.values()))
        found = [(parse_key(name), curve) for name, curve in self.curves.items()]
        return sorted(
            ((key, curve) for key, curve in found if key.base == base),
            key=lambda pair: (splits.index(pair[0].split), natural(pair[0].group), pair[0].kind),
        )

    def curve(self, base: str, split: str = "train", group: str = "") -> pd.Series:
        """One curve of a quantity without NaN and infinities; empty where nothing was logged."""
        found = [c for k, c in self.family(base) if (k.split, k.group) == (split, group)]
        return finite(found[-1]) if found else curve_of({})

    def last(self, base: str, split: str = "train") -> float | None:
        """The last value of a quantity, of all parameters."""
        curve = self.curve(base, split)
        return None if curve.empty else float(curve.iloc[-1])

    def errors(self, base: str, group: str = "") -> pd.Series:
        """Standard errors of a curve; zero where there are none."""
        found = self.curve(f"{base}_se", group=group)
        return found.reindex(self.curve(base, group=group).index).fillna(0.0)

"""What repeated labels say of the noise rate, and annotators of one another."""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd

from poprisk_integrations.core.calibration import wilson_interval
from poprisk_integrations.core.noise_rate import double_annotation_rate

__all__ = ["Annotator", "RepeatedLabels", "compare_annotators", "repeated_labels"]

# An annotator stands out by at least this difference of shares, over at least so many pairs, and by
# more than chance would give one of that many annotators in a twentieth of the data sets.
_DIFFERENCE, _FEWEST, _ERROR = 0.1, 10, 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class RepeatedLabels:
    """Pairs that were labelled more than once, and the noise rate of single labels they imply.

    Attributes:
        num_pairs: Pairs with two labels or more.
        disagreement: Of two labels of a pair, the probability that they differ.
        rate: Noise rate of single labels, see `double_annotation_rate`; None where there is none:
            the labels differ as often as random ones, or none differs and they may be copies.
        standard_error: Of the rate.
        low: Lower end of its 95 % interval.
        high: Upper end.
        by_annotators: Whether the labels are of different annotators. Otherwise rows of the same
            pair are taken for labels of their own; copies of one label make the rate too low.
    """

    num_pairs: int
    disagreement: float
    rate: float | None
    standard_error: float | None
    low: float | None
    high: float | None
    by_annotators: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Annotator:
    """One annotator's labels beside those of the others.

    Attributes:
        name: The value of the column, as text.
        pairs: Rows labelled.
        shared: Of them, pairs that another annotator has labelled too.
        disagreement: Mean share of the others' labels that differ, over the shared pairs.
        disagreement_without: How often the others' labels differ from one another.
        prefers_longer: Share of the pairs of unequal lengths in which the longer answer is chosen.
        unequal: How many these are.
        stands_out: "disagrees", "prefers longer", "prefers shorter".
    """

    name: str
    pairs: int
    shared: int
    disagreement: float | None
    disagreement_without: float | None
    prefers_longer: float | None
    unequal: int
    stands_out: tuple[str, ...]


def repeated_labels(labels: pd.DataFrame) -> RepeatedLabels | None:
    """The noise rate from pairs with several labels; None if there are none.

    Of annotators each has one label of a pair, however often it is written; whoever gives both has
    none. Without annotators every row is a label, but if all pairs are written equally often
    (k times: one file joined k times, say) every k-th is.

    Args:
        labels: Of a `PairScan`.

    Example:
        >>> columns = {"key": [1, 1, 2, 2], "direction": [0, 1, 0, 0], "annotator": list("abab")}
        >>> repeated_labels(pd.DataFrame(columns).astype({"annotator": "category"})).disagreement
        0.5
    """
    by_annotators = bool(labels["annotator"].notna().any())
    votes = _votes(labels) if by_annotators else labels
    count = votes.groupby("key")["direction"].agg(["sum", "size"])
    up, down = count["sum"].to_numpy(), (count["size"] - count["sum"]).to_numpy()
    if not by_annotators and len(count):
        every = np.gcd.reduce(np.concatenate([up, down]))
        up, down = up // every, down // every
    several = up + down > 1
    if not several.any():
        return None
    num_pairs = int(several.sum())
    differing = float(_differing(up[several], down[several]).sum())
    rate = error = low = high = None
    if differing < 0.5 * num_pairs and (differing or by_annotators):
        rate, error = double_annotation_rate(num_pairs, differing)
        low, high = (
            double_annotation_rate(num_pairs, share * num_pairs)[0]
            for share in wilson_interval(differing / num_pairs, num_pairs)
        )
    return RepeatedLabels(
        num_pairs=num_pairs,
        disagreement=differing / num_pairs,
        rate=rate,
        standard_error=error,
        low=low,
        high=high,
        by_annotators=by_annotators,
    )


def compare_annotators(labels: pd.DataFrame) -> list[Annotator]:
    """Every annotator, those who stand out first, then by their number of pairs.

    One who disagrees with all the others raises the others' disagreement as well. So each is
    compared with how often the others differ among themselves, which needs three annotators.

    Args:
        labels: Of a `PairScan`.
    """
    known = labels[labels["annotator"].notna()]
    if not len(known):
        return []
    votes = _votes(known)
    groups = votes.groupby("key")["direction"]
    size, up = groups.transform("size"), groups.transform("sum")
    votes = votes.assign(up=up, down=size - up)[size > 1]
    mine, others = votes["direction"], votes["up"] + votes["down"] - 1
    votes = votes.assign(
        opposed=(votes["down"].where(mine == 1, votes["up"])) / others,
        differing=_differing(votes["up"], votes["down"]),
        rest=others > 1,
        without=_differing(votes["up"] - mine, votes["down"] - (1 - mine)),
    )
    pairs = votes.drop_duplicates("key")
    all_differing, all_pairs = pairs["differing"].sum(), len(pairs)
    by_name = votes.groupby("annotator", observed=False)
    shared = by_name.size()
    sums = by_name[["opposed", "differing", "rest", "without"]].sum()
    # The pairs that the others share: those without this annotator, and the rest of those with.
    rest = all_pairs - shared + sums["rest"]
    rest_differing = all_differing - sums["differing"] + sums["without"]
    unequal = known.drop_duplicates(["key", "direction", "annotator"])
    unequal = unequal[unequal["longer"] != 0]
    longer = (unequal["longer"] > 0).groupby(unequal["annotator"], observed=False)
    lengths, longs = longer.size(), longer.sum()
    table = pd.DataFrame(
        {
            "pairs": known["annotator"].value_counts(),
            "shared": shared,
            "opposed": sums["opposed"],
            "rest": rest,
            "rest_differing": rest_differing,
            "unequal": lengths,
            "longer": longs,
        }
    )
    z = NormalDist().inv_cdf(1 - _ERROR / (2 * len(table)))
    # Not the mean: an annotator unlike the rest would move it, and the rest would stand out.
    usual = (longs / lengths)[lengths >= _FEWEST].median()
    found = []
    for row in table.itertuples():
        stands_out = []
        if _difference(row.opposed, row.shared, row.rest_differing, row.rest, z) > 0:
            stands_out.append("disagrees")
        others = lengths.sum() - row.unequal
        bias = _difference(row.longer, row.unequal, usual * others, others, z)
        if bias:
            stands_out.append("prefers longer" if bias > 0 else "prefers shorter")
        found.append(
            Annotator(
                name=str(row.Index),
                pairs=int(row.pairs),
                shared=int(row.shared),
                disagreement=_share(row.opposed, row.shared),
                disagreement_without=_share(row.rest_differing, row.rest),
                prefers_longer=_share(row.longer, row.unequal),
                unequal=int(row.unequal),
                stands_out=tuple(stands_out),
            )
        )
    return sorted(found, key=lambda one: (-len(one.stands_out), -one.pairs, one.name))


def _votes(labels: pd.DataFrame) -> pd.DataFrame:
    """One label of each annotator for a pair; none of those who give both."""
    labels = labels[labels["annotator"].notna()]
    votes = labels.drop_duplicates(["key", "annotator", "direction"])
    return votes[~votes.duplicated(["key", "annotator"], keep=False)]


def _differing(up: Any, down: Any) -> Any:
    """Probability that two labels of a pair differ; 0 where there is one."""
    count = np.asarray(up + down)
    return np.asarray(2 * up * down) / np.maximum(count * (count - 1), 1)


def _share(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def _difference(hits: float, draws: float, others: float, other_draws: float, z: float) -> float:
    """Difference of two shares, or 0 where it may be chance or is too small to matter."""
    if draws < _FEWEST or other_draws < _FEWEST:
        return 0.0
    difference = hits / draws - others / other_draws
    pooled = (hits + others) / (draws + other_draws)
    error = math.sqrt(pooled * (1 - pooled) * (1 / draws + 1 / other_draws))
    return difference if abs(difference) > max(_DIFFERENCE, z * error) else 0.0

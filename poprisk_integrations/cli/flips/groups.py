"""Mean P(wrong) of groups of pairs: of each annotator, and by which answer is longer."""

# mypy: disable-error-code="no-untyped-call"

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset
from datasets.utils import tqdm

from poprisk_integrations.cli.errors import UsageError
from poprisk_integrations.core.calibration import wilson_interval
from poprisk_integrations.trl.flip_report import DROP_AT, FlipReport
from poprisk_integrations.trl.pairs import on_one_line, pair_texts

__all__ = ["group_pairs"]

_TEXTS = ("prompt", "chosen", "rejected")
_THIRDS = 3
_NAMELESS = "(none)"


def group_pairs(
    report: FlipReport, dataset: Dataset, rows: Sequence[int], annotator_column: str | None
) -> dict[str, list[dict[str, Any]]]:
    """Groups by "annotator", where a column is named, and by "length"; `rows` as of `load_data`.

    A group has its name `group`, `pairs` that were judged, `suspects` among them, and the `mean` of
    P(wrong) with `low` and `high`, Wilson's 95 % interval at the mean: on the safe side, since it
    holds how the probabilities differ and also that each is only one. Annotators come in the order
    of `low`, the worst first; thirds of the difference in length, chosen minus rejected in
    characters, from the most negative on. Pairs of one length are in one group, and where that is
    the only one it is left out.
    """
    table = report.to_pandas().assign(place=list(rows))
    table = table[table["probability_wrong"].notna()]
    if table.empty:
        return {}
    found = {}
    if annotator_column is not None:
        groups = _annotators(dataset, annotator_column, table["place"].tolist())
        rated = _rated(table["probability_wrong"], groups)
        found["annotator"] = sorted(rated, key=lambda one: -one["low"])
    lengths = _length_differences(dataset, table["place"].tolist())
    shares = [third / _THIRDS for third in range(1, _THIRDS)]
    cuts = np.unique(np.quantile(lengths, shares, method="lower"))
    thirds = np.searchsorted(cuts, lengths)
    if thirds.min() == thirds.max():
        return found
    names = {}
    for third in sorted({*thirds.tolist()}):
        part = lengths[thirds == third]
        low, high = f"{part.min():+d}", f"{part.max():+d}"
        names[third] = low if low == high else f"{low} to {high}"
    found["length"] = _rated(table["probability_wrong"], [names[third] for third in thirds])
    order = list(names.values())
    found["length"].sort(key=lambda one: order.index(one["group"]))
    return found


def _rated(probability: pd.Series, groups: Sequence[str]) -> list[dict[str, Any]]:
    found = []
    for name, p in probability.groupby(np.asarray(groups, dtype=object)):
        mean = float(p.mean())
        low, high = wilson_interval(mean, len(p))
        found.append(
            {
                "group": str(name),
                "pairs": len(p),
                "suspects": int(p.ge(DROP_AT).sum()),
                "mean": mean,
                "low": low,
                "high": high,
            }
        )
    return found


def _annotators(dataset: Dataset, column: str, places: Sequence[int]) -> list[str]:
    values = dataset.with_format(None)[column][:]
    names = []
    for place in places:
        value = values[place]
        if isinstance(value, (list, dict, bytes)):
            raise UsageError(
                f"Invalid --annotator-column: {column!r}. Row {place} has "
                f"{on_one_line(str(value))[:60]!r}; must be text or a number."
            )
        names.append(_NAMELESS if value is None else on_one_line(str(value)))
    return names


def _length_differences(dataset: Dataset, places: Sequence[int]) -> np.ndarray:
    """Chosen minus rejected in characters: of conversations the last message counts."""
    names = [name for name in _TEXTS if name in dataset.column_names]
    texts = dataset.with_format(None).select_columns(names)
    differences = np.zeros(len(texts), dtype=np.int64)
    # The bar appears only where it takes long.
    for row, example in enumerate(tqdm(texts, desc="Lengths", delay=2.0)):
        _, chosen, rejected = pair_texts(example)
        differences[row] = len(chosen) - len(rejected)
    return differences[list(places)]

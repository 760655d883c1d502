"""The table of a run's preference pairs, those first whose label is most probably wrong."""

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from poprisk_integrations._files import write_whole
from poprisk_integrations.core.label_advice import LabelAdvice, label_advice

__all__ = [
    "ACTIONS",
    "DROP_AT",
    "FLIP_REPORT",
    "REVIEW_AT",
    "SWAP_AT",
    "FlipReport",
    "suggested_actions",
]

FLIP_REPORT = "flip_report"  # name of the files, without their suffix

# From which probability of a wrong label on an action is suggested.
SWAP_AT = 0.9  # exchanged, a label is right nine times in ten
DROP_AT = 0.5  # more probably wrong than right
REVIEW_AT = 0.3  # worth a look by a person; below, the pair is kept
ACTIONS = ("swap", "drop", "review", "keep", "not_judged", "unseen", "too_long")

# What a damaged file makes of csv, pandas and pyarrow.
_UNREADABLE = (ValueError, csv.Error, OSError, TypeError, LookupError, NotImplementedError)

_COLUMNS = ("pair_id", "row", "probability_wrong", "margin", "step", "action")
_NUMBERS = {"row": int, "step": int, "probability_wrong": float, "margin": float}
_TEXTS = ("prompt", "chosen", "rejected")
_CALIBRATED = "calibrated"  # a column of the files, where it is false


def suggested_actions(probability_wrong: Sequence[float], calibrated: bool = True) -> list[str]:
    """What to do with pairs, by the probability that their label is wrong; NaN where no margin is.

    A mere ranking, which is not calibrated, changes no data: "review" is then the strongest.

    Example:
        >>> suggested_actions([0.95, 0.9, 0.5, 0.3, 0.1, math.nan])
        ['swap', 'swap', 'drop', 'review', 'keep', 'unseen']
    """
    p = np.asarray(probability_wrong, dtype=np.float64)
    conditions = [np.isnan(p), p >= SWAP_AT, p >= DROP_AT, p >= REVIEW_AT]
    actions = ["unseen", "swap", "drop", "review"] if calibrated else ["unseen", *3 * ["review"]]
    chosen: list[str] = np.select(conditions, actions, "keep").tolist()
    return chosen


class FlipReport:
    """Preference pairs with the probability that their label is wrong, the most suspect first.

    Pairs without a probability come last; equal ones are in the order of their margins.

    Args:
        pair_id: The user's ids, all text or all integers, or the row numbers; unique.
        row: Row numbers in the training data as they were passed to the trainer, before any pair
            was dropped; >= 0, unique.
        probability_wrong: In [0, 1]; NaN where no margin was taken, or one that says nothing.
        margin: From before the pair was trained on, reward units; NaN where none was taken, or
            where it was not finite.
        step: Optimizer steps done when it was taken; -1 where none was.
        action: One of `ACTIONS` for each pair; `suggested_actions` by default. "too_long" is for
            pairs that TRL dropped since their prompt fills `max_length`, "not_judged" for those
            whose margin is from before the model had learned anything.
        calibrated: False where the noise rate could not be told: the column `probability_wrong`
            then ranks the pairs and is no probability.
        texts: Prompt, chosen and rejected of some rows, in short; they become columns, empty in
            the other rows.

    Raises:
        ValueError: If the columns do not fit together or hold what they cannot.

    Example:
        >>> report = FlipReport(
        ...     pair_id=["a", "b", "c"],
        ...     row=[0, 1, 2],
        ...     probability_wrong=[0.1, 0.95, math.nan],
        ...     margin=[1.5, -2.0, math.nan],
        ...     step=[0, 3, -1],
        ... )
        >>> print(report)
        3 pairs, 1.1 wrong labels expected: 1 swap, 0 drop, 0 review, 1 keep, 1 unseen
        >>> report.top(1)["pair_id"].tolist()
        ['b']
    """

    def __init__(
        self,
        *,
        pair_id: Sequence[str] | Sequence[int],
        row: Sequence[int],
        probability_wrong: Sequence[float],
        margin: Sequence[float],
        step: Sequence[int],
        action: Sequence[str] | None = None,
        calibrated: bool = True,
        texts: Mapping[int, tuple[str, str, str]] | None = None,
    ) -> None:
        if action is None:
            action = suggested_actions(probability_wrong, calibrated)
        given = (pair_id, row, probability_wrong, margin, step, action)
        lengths = {name: len(values) for name, values in zip(_COLUMNS, given, strict=True)}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"The columns of a flip report must be of one length, not {lengths}.")
        frame = pd.DataFrame(
            {
                "pair_id": _ids(pair_id),
                "row": _integers("row", row, smallest=0),
                "probability_wrong": np.asarray(probability_wrong, dtype=np.float64),
                "margin": np.asarray(margin, dtype=np.float64),
                "step": _integers("step", step, smallest=-1),
                "action": pd.Series(list(action), dtype=str),
            }
        )
        _check(frame)
        if texts:
            cells = [texts.get(number, ("", "", "")) for number in frame["row"].tolist()]
            for name, column in zip(_TEXTS, zip(*cells, strict=True), strict=True):
                frame[name] = pd.Series(list(column), dtype=str)
        self.calibrated = calibrated
        self._frame = frame.sort_values(
            ["probability_wrong", "margin", "row"],
            ascending=[False, True, True],
            na_position="last",
        ).reset_index(drop=True)

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self._frame)

    def __str__(self) -> str:
        """One line for people."""
        summary = self.summary()
        always = ("swap", "drop", "review", "keep")
        counts = [f"{n} {name}" for name, n in summary["actions"].items() if n or name in always]
        expected = "ranked by their margins alone, since these do not tell the noise rate"
        if self.calibrated:
            expected = f"{summary['expected_wrong']:.1f} wrong labels expected"
        return f"{len(self)} pairs, {expected}: {', '.join(counts)}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self}\n{self._frame!r}"

    def _repr_html_(self) -> str:
        """What notebooks show."""
        return f"<p>{self}</p>{self._frame.to_html(max_rows=20, index=False)}"

    def to_pandas(self) -> pd.DataFrame:
        """The table, as a copy."""
        return self._frame.copy()

    def top(self, count: int) -> pd.DataFrame:
        """The pairs whose label is most probably wrong.

        Args:
            count: How many, >= 0; fewer where there are fewer. Pairs without a probability are
                never among them.
        """
        return self._frame[self._frame["probability_wrong"].notna()].head(count).copy()

    def summary(self) -> dict[str, Any]:
        """Counts, and the expected number of wrong labels.

        Returns:
            `num_pairs`; `num_scored`, those with a probability; `num_not_judged`, those whose
            margin says nothing; `calibrated`; `expected_wrong`, the sum of the probabilities, or
            None if they are not calibrated; `actions`, a count for each of `ACTIONS`.
        """
        counts = self._frame["action"].value_counts()
        p = self._frame["probability_wrong"]
        return {
            "num_pairs": len(self),
            "num_scored": int(p.notna().sum()),
            "num_not_judged": int(counts.get("not_judged", 0)),
            "calibrated": self.calibrated,
            "expected_wrong": float(p.sum()) if self.calibrated else None,
            "actions": {name: int(counts.get(name, 0)) for name in ACTIONS},
        }

    def advice(
        self, command: str = "poprisk flips RUN_DIR --dataset DATA", *, cleaned: bool = False
    ) -> LabelAdvice:
        """What to do next.

        Args:
            command: Cleans the data, up to where it says which file to write.
            cleaned: Whether `poprisk clean` has been run on the pairs.

        Returns:
            Its `kind` is "suspect", "none_suspect", "not_told" or "not_judged"; as text it is a
            sentence for people.
        """
        p = self._frame["probability_wrong"]
        return label_advice(
            num_judged=int(p.notna().sum()),
            num_suspect=int(p.ge(DROP_AT).sum()),
            calibrated=self.calibrated,
            command=command,
            cleaned=cleaned,
        )

    def save(self, directory: str | os.PathLike[str]) -> list[Path]:
        """Write `flip_report.csv` and `flip_report.parquet`, each whole or not at all.

        In the CSV text is quoted and numbers are not, which is how `load` tells the id "7" from 7.

        Args:
            directory: Is made if it does not exist.

        Returns:
            The two paths.
        """
        frame, base = self._frame, Path(directory) / FLIP_REPORT
        if not self.calibrated:
            frame = frame.assign(**{_CALIBRATED: False})
        with write_whole(base.with_suffix(".csv")) as path:
            frame.to_csv(path, index=False, quoting=csv.QUOTE_NONNUMERIC, encoding="utf-8")
        with write_whole(base.with_suffix(".parquet")) as path:
            frame.to_parquet(path, index=False)
        return [base.with_suffix(".csv"), base.with_suffix(".parquet")]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "FlipReport":
        """Read a report.

        Args:
            path: A `.parquet` or `.csv` file, or a directory with `flip_report.parquet` or, failing
                that, `flip_report.csv`. Columns of yours are not read.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If the file is no flip report; the message names the file.
        """
        file = _find(Path(path))
        try:
            return cls(**_arguments(_READERS[file.suffix](file)))
        except _UNREADABLE as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the system's, such as no permission; pyarrow's have no number
            reason = " ".join(str(error).split())
            raise ValueError(f"{str(file)!r} is not a flip report: {reason}") from None


def _ids(values: Sequence[Any]) -> pd.Series:
    ids = list(values)
    if all(isinstance(value, str) for value in ids):
        return pd.Series(ids, dtype=str)
    for value in ids:
        if not isinstance(value, (str, int, np.integer)) or isinstance(value, bool):
            raise ValueError(f"Invalid pair_id: {value!r}. Must be text or an integer.")
    if any(isinstance(value, str) for value in ids):
        raise ValueError("Invalid pair_id: some are text and some integers. Use one of them.")
    series = pd.Series([int(value) for value in ids])
    if series.dtype.kind not in "iu":
        raise ValueError("Invalid pair_id: integers must fit 64 bits. Use text.")
    return series


def _integers(name: str, values: Sequence[int], smallest: int) -> np.ndarray:
    array = np.asarray(values)
    if len(array) == 0:
        return np.zeros(0, dtype=np.int64)
    if array.dtype.kind not in "iu":
        raise ValueError(f"Invalid {name}: must be integers, not {array.dtype}.")
    if array.min() < smallest:
        raise ValueError(f"Invalid {name}: {array.min()}. Must be >= {smallest}.")
    return array.astype(np.int64)


def _check(frame: pd.DataFrame) -> None:
    """Raise ValueError for the first rule that a row breaks."""
    p, margin, action = frame["probability_wrong"], frame["margin"], frame["action"]
    broken = {
        ("pair_id", "Must occur once."): frame["pair_id"].duplicated(),
        ("row", "Must occur once."): frame["row"].duplicated(),
        ("probability_wrong", "Must be in [0, 1], or NaN."): ~(p.isna() | p.between(0, 1)),
        ("margin", "Must be finite, or NaN."): np.isinf(margin),
        ("probability_wrong", "There is no margin to it."): p.notna() & margin.isna(),
        ("margin", "There is no step to it."): margin.notna() & (frame["step"] < 0),
        ("action", f"Must be one of {', '.join(ACTIONS)}."): ~action.isin(ACTIONS),
    }
    for (name, rule), rows in broken.items():
        if rows.any():
            raise ValueError(f"Invalid {name}: {frame[name][rows].tolist()[0]!r}. {rule}")


def _find(path: Path) -> Path:
    if path.is_dir():
        for suffix in _READERS:
            if (path / f"{FLIP_REPORT}{suffix}").is_file():
                return path / f"{FLIP_REPORT}{suffix}"
        raise FileNotFoundError(f"no {FLIP_REPORT}.parquet or {FLIP_REPORT}.csv in {str(path)!r}")
    if not path.is_file():
        raise FileNotFoundError(f"no flip report at {str(path)!r}")
    if path.suffix not in _READERS:
        raise ValueError(f"{str(path)!r} is not a flip report: neither .parquet nor .csv.")
    return path


def _read_parquet(path: Path) -> dict[str, list[Any]]:
    frame = pd.read_parquet(path)
    return {name: frame[name].tolist() for name in frame.columns}


def _read_csv(path: Path) -> dict[str, list[Any]]:
    with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets put a mark in front
        text = file.read()
    lines = [line for line in csv.reader(io.StringIO(text, newline=""), strict=True) if line]
    header, records = (lines[0], lines[1:]) if lines else ([], [])
    for number, record in enumerate(records, start=1):
        if len(record) != len(header):
            raise ValueError(f"record {number} has {len(record)} of {len(header)} values.")
    found: dict[str, list[Any]] = {
        name: [record[place] for record in records] for place, name in enumerate(header)
    }
    quoted = header[:1] == ["pair_id"] and text.partition("\n")[2].startswith('"')
    if "pair_id" in found and not quoted:
        # Integers of ours, or anything that a spreadsheet has saved again.
        found["pair_id"] = _integer_ids(found["pair_id"])
    return found


_READERS = {".parquet": _read_parquet, ".csv": _read_csv}


def _integer_ids(ids: list[str]) -> list[int] | list[str]:
    """As numbers only if that is what the text is: not 007, 1_000, or what 64 bits do not hold."""
    try:
        numbers = [int(value) for value in ids]
    except ValueError:
        return ids
    plain = all(str(n) == value for n, value in zip(numbers, ids, strict=True))
    return numbers if plain and all(-(2**63) <= n < 2**64 for n in numbers) else ids


def _arguments(found: dict[str, list[Any]]) -> dict[str, Any]:
    """Of the class, from the columns of a file."""
    missing = [name for name in _COLUMNS if name not in found]
    if missing:
        raise ValueError(f"it has no column {' and no column '.join(map(repr, missing))}.")
    columns: dict[str, Any] = {name: found[name] for name in _COLUMNS}
    for name, kind in _NUMBERS.items():
        columns[name] = [_parsed(name, value, kind) for value in columns[name]]
    flags = found.get(_CALIBRATED, [])
    columns["calibrated"] = all(str(flag).lower() not in ("false", "0") for flag in flags)
    if all(name in found for name in _TEXTS):
        cells = zip(*(found[name] for name in _TEXTS), strict=True)
        rows = zip(columns["row"], cells, strict=True)
        columns["texts"] = {row: texts for row, texts in rows if any(texts)}
    return columns


def _parsed(name: str, value: Any, kind: type) -> Any:
    """A number of a CSV file; empty is NaN."""
    if not isinstance(value, str):
        return value
    try:
        return math.nan if value == "" and kind is float else kind(value)
    except ValueError:
        raise ValueError(f"Invalid {name}: {value!r} is no {kind.__name__}.") from None

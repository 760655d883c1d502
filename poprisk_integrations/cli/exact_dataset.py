"""Makes data sets of rows that were read, without changing one of their texts and numbers."""

import bisect
import hashlib
import inspect
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from datasets import Dataset

from poprisk_integrations._files import write_whole
from poprisk_integrations.cli.data_file import read_columns
from poprisk_integrations.cli.errors import UsageError, one_line

__all__ = ["as_arrow_file"]

_LAYOUT = "1"  # of the files written here; another one has another name
# Messages with different keys need it (datasets >= 4.7); before, absent keys are None.
_MIXED: dict[str, Any] = (
    {"on_mixed_types": "use_json"}
    if "on_mixed_types" in inspect.signature(Dataset.from_dict).parameters
    else {}
)


def as_arrow_file(paths: Sequence[Path], number_columns: Collection[str] = ()) -> str:
    """The rows of CSV and JSON files as one Arrow file, for `load_dataset("arrow", ...)`.

    It lies in the cache of `datasets`, named after the files' content.

    Args:
        paths: The files, in order.
        number_columns: See `read_columns`.

    Raises:
        UsageError: If they cannot be read, or a value cannot be kept as it is.
        OSError: If they cannot be read, or the cache not be written.
    """
    content = hashlib.sha256(repr((_LAYOUT, _MIXED, sorted(number_columns))).encode())
    for path in paths:
        content.update(f"{path.name} {path.stat().st_size}".encode())
        content.update(path.read_bytes())
    target = Path(datasets.config.HF_DATASETS_CACHE) / "poprisk" / f"{content.hexdigest()}.arrow"
    if not target.is_file():
        table = _dataset(paths, number_columns).data.table
        with (
            write_whole(target) as temporary,
            pyarrow.OSFile(str(temporary), "wb") as file,
            pyarrow.ipc.new_stream(file, table.schema) as stream,
        ):
            stream.write_table(table, max_chunksize=1000)
    return str(target)


def _dataset(paths: Sequence[Path], number_columns: Collection[str]) -> Dataset:
    columns: dict[str, list[Any]] = {}
    starts = []
    count = 0
    for path in paths:
        starts.append(count)
        found = read_columns(path, number_columns)
        for name in [name for name in found if name not in columns]:
            columns[name] = [None] * count
        size = len(next(iter(found.values())))
        for name, values in columns.items():
            values.extend(found.get(name, [None] * size))
        count += size

    def place(row: int) -> str:
        index = bisect.bisect_right(starts, row) - 1
        return f"{str(paths[index])!r} row {row - starts[index]}"

    try:
        dataset = Dataset.from_dict(columns, **_MIXED)
    except (ValueError, TypeError, OverflowError) as error:
        raise UsageError(_first_bad(columns, place)) from error
    for name, feature in dataset.features.items():
        if "Json" in repr(feature):
            _check_kept(name, columns[name], dataset, place)
    return dataset


def _first_bad(columns: dict[str, list[Any]], place: Any) -> str:
    """The first value of the first column that no Arrow column can hold beside those before."""

    def error_of(name: str, count: int) -> Exception | None:
        try:
            Dataset.from_dict({name: columns[name][:count]}, **_MIXED)
        except (ValueError, TypeError, OverflowError) as error:
            return error
        return None

    for name, values in columns.items():
        if error_of(name, len(values)) is not None:
            counts = range(1, len(values) + 1)
            row = bisect.bisect_left(counts, True, key=lambda n: error_of(name, n) is not None)
            reason = one_line(error_of(name, row + 1) or ValueError())
            advice = "" if "codec" in reason else "; use text, for all values of the column"
            return f"{place(row)}: column {name!r} cannot be kept as it is ({reason}){advice}"
    return "the rows of the files do not fit together"


def _check_kept(name: str, values: list[Any], dataset: Dataset, place: Any) -> None:
    """`datasets` reads text inside its Json type again: "true" comes back as a truth value."""
    for row, (value, kept) in enumerate(zip(values, dataset[name], strict=True)):
        changed = _first_change(value, kept)
        if changed is not None:
            raise UsageError(
                f"{place(row)}: column {name!r} mixes types, and so {changed} would be changed; "
                "use one type for the whole column, in messages for each key"
            )


def _first_change(value: Any, kept: Any) -> str | None:
    if isinstance(value, dict) and isinstance(kept, dict):
        pairs = [(part, kept.get(key)) for key, part in value.items()]
    elif isinstance(value, list) and isinstance(kept, list) and len(value) == len(kept):
        pairs = list(zip(value, kept, strict=True))
    elif isinstance(value, float) and isinstance(kept, (int, float)):
        return None if math.isclose(value, kept, rel_tol=1e-9) or value != value else repr(value)
    else:
        return None if type(value) is type(kept) and value == kept else repr(value)[:60]
    return next(filter(None, (_first_change(*pair) for pair in pairs)), None)

"""Finds preference pairs: a hub name, local files or a directory, built-in ones, or a mixture.

Rows of CSV and JSON files become a data set without one of their texts and numbers changed: they go
through one Arrow file in the cache of `datasets`, whose own readers guess types.
"""

# TRL exports lazily and leaves most functions untyped.
# mypy: disable-error-code="attr-defined,no-untyped-call"

import bisect
import dataclasses
import glob
import hashlib
import inspect
import math
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from datasets import Dataset, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetsError
from trl import DatasetMixtureConfig, ScriptArguments, get_dataset

from poprisk_integrations._files import write_whole
from poprisk_integrations.cli.builtin import is_builtin, load_pairs
from poprisk_integrations.cli.data_file import check_parquet, kind, read_columns
from poprisk_integrations.cli.errors import UsageError, one_line

__all__ = ["load_preferences", "load_split"]

_TEXT_KINDS = (".csv", ".json", ".jsonl")
_KINDS = (*_TEXT_KINDS, ".parquet")
_TEXT_BUILDERS = ("csv", "json")
_REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")  # numbers that TRL reads from the data
_LAYOUT = "1"  # of the Arrow files written here; another one has another name
# Messages with different keys need it (datasets >= 4.7); before, absent keys are None.
_MIXED: dict[str, Any] = (
    {"on_mixed_types": "use_json"}
    if "on_mixed_types" in inspect.signature(Dataset.from_dict).parameters
    else {}
)
_UNFIT = (ValueError, TypeError, OverflowError)  # what no Arrow column can hold


def load_preferences(
    script: ScriptArguments,
    mixture: DatasetMixtureConfig,
    *,
    evaluate: bool,
    eval_name: str | None = None,
    number_columns: Collection[str] = (),
) -> tuple[Any, Any]:
    """Load the training pairs, and the evaluation pairs if wanted (else None).

    As in `trl dpo` a mixture of `datasets` wins over `dataset_name`. `eval_name` says where
    evaluation pairs are that are no split of the same data: all rows of local files, else the
    evaluation split of what has this name. `number_columns` are columns of CSV files that hold
    numbers, beside TRL's own.
    """
    numbers = {*number_columns, *_REFERENCE}
    train_split, test_split = script.dataset_train_split, script.dataset_test_split
    try:
        if mixture.datasets:
            splits = get_dataset(_exact_mixture(mixture, numbers))
        else:
            splits = _load(script, str(script.dataset_name), train_split, numbers)
        train = _split(splits, train_split)
        if not evaluate:
            return train, None
        if eval_name is not None:
            splits = _load(script, eval_name, test_split, numbers)
        return train, _split(splits, test_split)
    except (DatasetsError, OSError, ValueError) as error:
        # What lies under "An error occurred while generating the dataset".
        cause = f" ({one_line(error.__cause__)})" if error.__cause__ is not None else ""
        raise UsageError(f"cannot load the data: {one_line(error)}{cause}") from error


def load_split(name: str, split: str, config: str | None = None) -> Dataset:
    """The pairs that `dataset_name`, `dataset_train_split` and `dataset_config` stand for."""
    script = ScriptArguments(dataset_name=name, dataset_config=config, dataset_train_split=split)
    dataset, _ = load_preferences(script, DatasetMixtureConfig(), evaluate=False)
    return dataset


def _load(script: ScriptArguments, name: str, split: str, numbers: Collection[str]) -> Any:
    """All splits that a name stands for; local files are one, called `split`."""
    streaming = script.dataset_streaming
    if is_builtin(name):
        splits = load_pairs(name)
        streamed = {split: data.to_iterable_dataset() for split, data in splits.items()}
        return streamed if streaming else splits
    files = _local_files(name)
    if files is not None:
        return _load_files({split: files}, numbers, streaming=streaming)
    config = script.dataset_config
    folder = Path(name).expanduser()
    if folder.is_dir():
        name = str(folder)
        if glob.has_magic(str(folder.absolute())):
            raise UsageError(
                f"{name!r}: `datasets` takes brackets, stars and question marks in a folder's name "
                "for a pattern; rename it, or name the files"
            )
        found = load_dataset_builder(name, name=config).config.data_files or {}
        files_of = {str(key): [Path(file) for file in files] for key, files in found.items()}
        if all(kind(file) in _TEXT_KINDS for files in files_of.values() for file in files):
            return _load_files(files_of, numbers, streaming=streaming)
    return load_dataset(name, name=config, streaming=streaming)


def _local_files(name: str) -> list[Path] | None:
    """The files that a path or a pattern stands for; None for a directory, or a name on the hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        return None
    found = [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
    looks_local = name.startswith((os.sep, ".", "~")) or name.count("/") > 1 or kind(path) in _KINDS
    if not found and (looks_local or glob.has_magic(name)):
        raise UsageError(f"no such file or directory: {name!r}")
    for one in found:
        is_packed = (kind(one), one.suffix) == (".parquet", ".gz")
        if one.is_dir() or kind(one) not in _KINDS or is_packed:
            known = ", ".join(_KINDS)
            raise UsageError(
                f"{str(one)!r} is not a data file; known are {known}, .csv.gz and so on"
            )
    return found or None


def _load_files(splits: dict[str, list[Path]], numbers: Collection[str], *, streaming: bool) -> Any:
    kinds = {kind(file) for files in splits.values() for file in files}
    if kinds == {".parquet"}:
        for files in splits.values():
            for file in files:
                check_parquet(file)
        return load_dataset("parquet", data_files=_escaped(splits), streaming=streaming)
    if ".parquet" in kinds:
        raise UsageError(f"files of different kinds: {', '.join(sorted(kinds))}")
    arrow = {split: [_arrow_file(files, numbers)] for split, files in splits.items()}
    return load_dataset("arrow", data_files=_escaped(arrow), streaming=streaming)


def _escaped(splits: dict[str, list[Path]]) -> dict[str, list[str]]:
    # In a list of files `datasets` takes brackets and stars for patterns.
    return {split: [glob.escape(str(file)) for file in files] for split, files in splits.items()}


def _exact_mixture(mixture: DatasetMixtureConfig, numbers: Collection[str]) -> DatasetMixtureConfig:
    """The same sources, local CSV and JSON files read by us."""
    sources: list[Any] = []
    for source in mixture.datasets:
        if source.path in _TEXT_BUILDERS and source.data_files and source.data_dir is None:
            given = source.data_files
            splits = given if isinstance(given, dict) else {"train": given}
            files = {split: _local_only(names) for split, names in splits.items()}
            if all(files.values()):
                arrow = {split: [_arrow_file(f, numbers)] for split, f in files.items()}
                found: Any = _escaped(arrow)  # TRL's annotation knows one file for each split
                source = dataclasses.replace(source, path="arrow", data_files=found)
        sources.append(source)
    return dataclasses.replace(mixture, datasets=sources)


def _local_only(names: str | Iterable[str]) -> list[Path]:
    """The files of some names; none where one is not on this machine."""
    names = [names] if isinstance(names, str) else list(names)
    if any("://" in name for name in names):
        return []
    return [file for name in names for file in _local_files(name) or ()]


def _split(splits: Any, name: str) -> Any:
    if name not in splits:
        found = ", ".join(map(repr, splits))
        hint = "; eval_dataset_name may name other data" if len(splits) == 1 else ""
        raise UsageError(f"the data have no split {name!r}; found {found}{hint}")
    return splits[name]


def _arrow_file(paths: Sequence[Path], numbers: Collection[str]) -> Path:
    """The rows of CSV and JSON files as one Arrow file, named after the files' content."""
    content = hashlib.sha256(repr((_LAYOUT, _MIXED, sorted(numbers))).encode())
    for path in paths:
        content.update(f"{path.name} {path.stat().st_size}".encode())
        content.update(path.read_bytes())
    target = Path(datasets.config.HF_DATASETS_CACHE) / "poprisk" / f"{content.hexdigest()}.arrow"
    if not target.is_file():
        table = _exact_dataset(paths, numbers).data.table
        with (
            write_whole(target) as temporary,
            pyarrow.OSFile(str(temporary), "wb") as file,
            pyarrow.ipc.new_stream(file, table.schema) as stream,
        ):
            stream.write_table(table, max_chunksize=1000)
    return target


def _exact_dataset(paths: Sequence[Path], numbers: Collection[str]) -> Dataset:
    columns: dict[str, list[Any]] = {}
    starts, count = [], 0
    for path in paths:
        starts.append(count)
        found = read_columns(path, numbers)
        size = len(next(iter(found.values())))
        for name in {**columns, **found}:
            columns.setdefault(name, [None] * count).extend(found.get(name, [None] * size))
        count += size

    def place(row: int) -> str:
        index = bisect.bisect_right(starts, row) - 1
        return f"{str(paths[index])!r} row {row - starts[index]}"

    try:
        dataset = Dataset.from_dict(columns, **_MIXED)
    except _UNFIT as error:
        raise UsageError(_first_bad(columns, place)) from error
    for name, feature in dataset.features.items():
        if "Json" not in repr(feature):
            continue
        # `datasets` reads text inside its Json type again: "true" comes back as a truth value.
        for row, (value, kept) in enumerate(zip(columns[name], dataset[name], strict=True)):
            changed = _first_change(value, kept)
            if changed is not None:
                raise UsageError(
                    f"{place(row)}: column {name!r} mixes types, and so {changed} would be "
                    "changed; use one type for the whole column, in messages for each key"
                )
    return dataset


def _first_bad(columns: dict[str, list[Any]], place: Callable[[int], str]) -> str:
    """The first value of the first column that no Arrow column can hold beside those before."""

    def error_of(name: str, count: int) -> Exception | None:
        try:
            Dataset.from_dict({name: columns[name][:count]}, **_MIXED)
        except _UNFIT as error:
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

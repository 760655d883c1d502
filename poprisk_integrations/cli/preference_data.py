"""Finds preference pairs: a hub name, local files or a directory, built-in ones, or a mixture."""

# TRL exports lazily and leaves most functions untyped.
# mypy: disable-error-code="attr-defined,no-untyped-call"

import dataclasses
import glob
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from datasets import load_dataset, load_dataset_builder
from datasets.exceptions import DatasetsError
from trl import DatasetMixtureConfig, ScriptArguments, get_dataset

from poprisk_integrations.cli.builtin import is_builtin, load_pairs
from poprisk_integrations.cli.data_file import check_parquet, kind
from poprisk_integrations.cli.errors import UsageError, one_line
from poprisk_integrations.cli.exact_dataset import as_arrow_file

__all__ = ["load_preferences", "local_files"]

_TEXT_KINDS = (".csv", ".json", ".jsonl")
_KINDS = (*_TEXT_KINDS, ".parquet")
_TEXT_BUILDERS = ("csv", "json")
_REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")  # numbers that TRL reads from the data


def load_preferences(
    script: ScriptArguments,
    mixture: DatasetMixtureConfig,
    *,
    evaluate: bool,
    eval_name: str | None = None,
    number_columns: Collection[str] = (),
) -> tuple[Any, Any]:
    """Load the training pairs, and the evaluation pairs if wanted.

    Args:
        script: `dataset_name` and splits.
        mixture: `datasets`; it wins over `dataset_name`, as in `trl dpo`.
        evaluate: Whether to load evaluation pairs.
        eval_name: Where they are, if not in the evaluation split of the same data: all rows of
            local files, else the evaluation split of what has this name.
        number_columns: Columns of CSV files that hold numbers, where those are not TRL's own.

    Returns:
        Training data and evaluation data (or None).

    Raises:
        UsageError: If they cannot be found or read, or a split is missing.
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
        raise UsageError(f"cannot load the data: {one_line(error)}{_cause(error)}") from error


def local_files(name: str) -> list[Path] | None:
    """The files that a name stands for; None for a directory, and for a name on the hub.

    Args:
        name: Perhaps a path, or a pattern such as "data/*.jsonl".

    Raises:
        UsageError: If it looks like a path and there is nothing, or no data file.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return None
    found = [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
    looks_local = name.startswith((os.sep, ".", "~")) or name.count("/") > 1 or kind(path) in _KINDS
    if not found and (looks_local or glob.has_magic(name)):
        raise UsageError(f"no such file or directory: {name!r}")
    for one in found:
        if (
            one.is_dir()
            or kind(one) not in _KINDS
            or (kind(one), one.suffix) == (".parquet", ".gz")
        ):
            known = ", ".join(_KINDS)
            raise UsageError(
                f"{str(one)!r} is not a data file; known are {known}, .csv.gz and so on"
            )
    return found or None


def _load(script: ScriptArguments, name: str, split: str, numbers: Collection[str]) -> Any:
    """All splits that a name stands for; local files are one, called `split`."""
    streaming = script.dataset_streaming
    if is_builtin(name):
        splits = load_pairs(name)
        streamed = {split: data.to_iterable_dataset() for split, data in splits.items()}
        return streamed if streaming else splits
    files = local_files(name)
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


def _load_files(splits: dict[str, list[Path]], numbers: Collection[str], *, streaming: bool) -> Any:
    kinds = {kind(file) for files in splits.values() for file in files}
    if kinds == {".parquet"}:
        for files in splits.values():
            for file in files:
                check_parquet(file)
        return load_dataset("parquet", data_files=_strings(splits), streaming=streaming)
    if ".parquet" in kinds:
        raise UsageError(f"files of different kinds: {', '.join(sorted(kinds))}")
    arrow = {split: [Path(as_arrow_file(files, numbers))] for split, files in splits.items()}
    return load_dataset("arrow", data_files=_strings(arrow), streaming=streaming)


def _strings(splits: dict[str, list[Path]]) -> dict[str, list[str]]:
    # Escaped: in a list of files `datasets` takes brackets and stars for patterns.
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
                arrow = {split: [Path(as_arrow_file(f, numbers))] for split, f in files.items()}
                found: Any = _strings(arrow)  # TRL's annotation knows one file for each split
                source = dataclasses.replace(source, path="arrow", data_files=found)
        sources.append(source)
    return dataclasses.replace(mixture, datasets=sources)


def _local_only(names: str | Iterable[str]) -> list[Path]:
    """The files of some names; none where one is not on this machine."""
    names = [names] if isinstance(names, str) else list(names)
    if any("://" in name for name in names):
        return []
    return [file for name in names for file in local_files(name) or ()]


def _split(splits: Any, name: str) -> Any:
    if name not in splits:
        found = ", ".join(map(repr, splits))
        hint = "; eval_dataset_name may name other data" if len(splits) == 1 else ""
        raise UsageError(f"the data have no split {name!r}; found {found}{hint}")
    return splits[name]


def _cause(error: BaseException) -> str:
    """What lies under "An error occurred while generating the dataset"."""
    return f" ({one_line(error.__cause__)})" if error.__cause__ is not None else ""

"""Loads preference pairs: a hub name, a local file or directory, built-in ones, or a mixture."""

# TRL exports lazily and leaves most functions untyped.
# mypy: disable-error-code="attr-defined,no-untyped-call"

from pathlib import Path
from typing import Any

from datasets import load_dataset
from datasets.exceptions import DatasetsError
from trl import DatasetMixtureConfig, ScriptArguments, get_dataset

from poprisk_integrations.cli.builtin import is_builtin, load_pairs
from poprisk_integrations.cli.errors import UsageError, one_line

__all__ = ["builder_for_file", "load_preferences"]

_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def builder_for_file(path: str) -> str | None:
    """The builder of `datasets` for a local file, or None if the path is not a file.

    Raises:
        UsageError: If it is a file of another kind.
    """
    if not Path(path).is_file():
        return None
    suffix = Path(path).suffix.lower()
    if suffix not in _BUILDERS:
        raise UsageError(f"{path!r} is not a data file; known are {', '.join(sorted(_BUILDERS))}")
    return _BUILDERS[suffix]


def load_preferences(
    script: ScriptArguments, mixture: DatasetMixtureConfig, *, evaluate: bool
) -> tuple[Any, Any]:
    """Load the training pairs, and the evaluation pairs if wanted.

    Args:
        script: `dataset_name` and splits.
        mixture: `datasets`; it wins over `dataset_name`, as in `trl dpo`.
        evaluate: Whether to load the evaluation split.

    Returns:
        Training data and evaluation data (or None).

    Raises:
        UsageError: If they cannot be found or read, or a split is missing.
    """
    try:
        splits = get_dataset(mixture) if mixture.datasets else _load_by_name(script)
    except (DatasetsError, OSError, ValueError) as error:
        raise UsageError(f"cannot load the data: {one_line(error)}") from error
    train = _split(splits, script.dataset_train_split)
    return train, _split(splits, script.dataset_test_split) if evaluate else None


def _load_by_name(script: ScriptArguments) -> Any:
    name = str(script.dataset_name)
    if is_builtin(name):
        splits = load_pairs(name)
        streamed = {split: data.to_iterable_dataset() for split, data in splits.items()}
        return streamed if script.dataset_streaming else splits
    builder = builder_for_file(name)
    if builder is not None:
        files = {script.dataset_train_split: name}
        return load_dataset(builder, data_files=files, streaming=script.dataset_streaming)
    return load_dataset(name, name=script.dataset_config, streaming=script.dataset_streaming)


def _split(splits: Any, name: str) -> Any:
    if name not in splits:
        raise UsageError(f"the data have no split {name!r}; found {', '.join(map(repr, splits))}")
    return splits[name]

"""Options that name the data of a flip report: the same for `flips` and `report`."""

import argparse
import shlex
from pathlib import Path

from poprisk_integrations.cli.errors import UsageError

__all__ = ["add_data_arguments", "check_data_arguments", "flips_command"]


def add_data_arguments(parser: argparse.ArgumentParser, purpose: str) -> None:
    """Add --dataset, which serves this purpose, and what tells its split and its columns."""
    add = parser.add_argument
    add("--dataset", metavar="NAME_OR_PATH", help=f"the training data, {purpose}")
    add("--dataset-config", metavar="NAME", help="its configuration, where there are several")
    add("--split", default="train", help="its split (default: %(default)s)")
    add("--id-column", metavar="NAME", help="its column that holds the ids of the report")
    add(
        "--annotator-column",
        metavar="NAME",
        help="its column that says who labelled a pair: how many labels of each are suspect",
    )


def check_data_arguments(args: argparse.Namespace) -> None:
    """Refuse a column of data that are not named."""
    for option in ("id_column", "annotator_column"):
        if args.dataset is None and getattr(args, option) is not None:
            name = option.replace("_", "-")
            raise UsageError(f"--{name} needs --dataset: the data that the trainer got.")


def flips_command(
    run_dir: Path,
    dataset: str | None = None,
    *,
    id_column: str | None = None,
    has_ids: bool = False,
    config: str | None = None,
    split: str = "train",
) -> str:
    """The command that shows the pairs of a run with their texts; DATA and NAME for the unknown."""
    command = (
        f"poprisk flips {shlex.quote(str(run_dir))} --dataset {shlex.quote(dataset or 'DATA')}"
    )
    column = id_column or ("NAME" if has_ids else None)
    options = {"--dataset-config": config, "--split": split, "--id-column": column}
    for option, value in options.items():
        if value is not None and (option, value) != ("--split", "train"):
            command += f" {option} {shlex.quote(value)}"
    return command

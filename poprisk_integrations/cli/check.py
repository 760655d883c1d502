"""`poprisk check DATA`: what is wrong with preference pairs, before any training."""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poprisk_integrations._imports import require
from poprisk_integrations.cli.errors import UsageError, at_least, one_line
from poprisk_integrations.cli.output import progress_bar, say

if TYPE_CHECKING:
    from rich.console import Console

    from poprisk_integrations.trl.pair_checks import PairCheck

__all__ = ["add_parser", "print_check", "run"]

_STYLES = {"fix": "bold red", "warn": "yellow", "note": "dim"}
_SHOWN_ANNOTATORS = 20


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `check` to the command line."""
    parser = subparsers.add_parser(
        "check",
        help="what is wrong with preference data, before any training",
        description="Looks at preference pairs before any training: empty, identical, copied and "
        "contradicting ones, the noise rate that repeated labels imply, each annotator, and "
        "whether the longer answer is preferred; with --tokenizer also what becomes of the texts. "
        "Exit status: 0 if nothing must be fixed, 1 if there are pairs from which nothing can be "
        "learned, 2 for bad input. Rows are numbered from 0.",
    )
    add = parser.add_argument
    add(
        "data",
        metavar="DATA",
        help="as dataset_name of `poprisk dpo`: a local file (.jsonl, .json, .csv, .parquet), a "
        "directory, a name on the hub, or builtin:tiny-pairs",
    )
    add("--dataset-config", metavar="NAME", help="its configuration, where there are several")
    add("--split", default="train", help="its split (default: %(default)s)")
    add(
        "--annotator-column",
        metavar="NAME",
        help="who labelled a pair (default: annotator, labeler, worker, rater, each also with _id)",
    )
    add("--tokenizer", metavar="PATH", help="of the model: a directory, or a name on the hub")
    add(
        "--max-length",
        type=at_least(1),
        metavar="N",
        help="max_length of the training, in tokens (default: that of `poprisk dpo`)",
    )
    add("--truncation-mode", choices=("keep_start", "keep_end"), help="of the training")
    add("--quiet", action="store_true", help="print nothing but errors")
    add("--json", action="store_true", help="print JSON, and nothing else, to stdout")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Look, and print."""
    for option in ("max_length", "truncation_mode"):
        if getattr(args, option) is not None and args.tokenizer is None:
            raise UsageError(f"--{option.replace('_', '-')} counts tokens: it needs --tokenizer.")
    require("transformers", "datasets", "trl", extra="trl")
    import datasets

    from poprisk_integrations.cli.preference_data import load_split
    from poprisk_integrations.trl import PopRiskDPOConfig
    from poprisk_integrations.trl.pair_checks import check_pairs

    quiet = args.quiet or args.json
    if quiet:
        datasets.disable_progress_bars()
    tokenizer = None if args.tokenizer is None else _load_tokenizer(args.tokenizer)
    dataset = load_split(args.data, args.split, args.dataset_config)
    defaults: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(PopRiskDPOConfig)}
    with progress_bar(len(dataset), "checking", shown=not quiet) as bar:
        check = check_pairs(
            dataset,
            annotator_column=args.annotator_column,
            tokenizer=tokenizer,
            max_length=None if tokenizer is None else args.max_length or defaults["max_length"],
            truncation_mode=args.truncation_mode or defaults["truncation_mode"],
            progress=bar.update,
        )
    if args.json:
        result = {"data": args.data, "split": args.split, **check.to_json()}
        print(json.dumps(result, indent=2, allow_nan=False))
    elif not args.quiet:
        from rich.console import Console

        print_check(Console(), f"{args.data} ({args.split})", check)
    return int(check.must_fix)


def _load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    from poprisk_integrations.cli.builtin import local_model

    with tempfile.TemporaryDirectory() as scratch:
        try:
            return AutoTokenizer.from_pretrained(local_model(name, Path(scratch)))
        except (OSError, ValueError, KeyError) as error:
            raise UsageError(f"Invalid --tokenizer: {name!r} ({one_line(error)}).") from error


def print_check(console: "Console", title: str, check: "PairCheck", *, advise: bool = True) -> None:
    """Print the findings, the annotators, and what to do next."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from poprisk_integrations.trl.pairs import on_one_line

    say(console, f"{title}: {check.num_pairs:,} pairs", style="bold")
    if check.findings:
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name in ("", "pairs", "finding", "first rows"):
            table.add_column(name, justify="right" if name == "pairs" else "left")
        for found in check.findings:
            more = ", ..." if found.rows and found.count > len(found.rows) else ""
            table.add_row(
                Text(found.level, style=_STYLES[found.level]),
                f"{found.count:,}",
                Text(on_one_line(found.text)),
                ", ".join(map(str, found.rows)) + more,
            )
        console.print(table)
    if check.annotators:
        who = on_one_line(str(check.annotator_column))
        columns = (who, "pairs", "shared", "differs", "others", "prefers longer")
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for place, name in enumerate(columns):
            table.add_column(Text(name), justify="right" if place else "left")
        for one in check.annotators[:_SHOWN_ANNOTATORS]:
            style = "bold red" if one.stands_out else ""
            shares = (one.disagreement, one.disagreement_without, one.prefers_longer)
            shown = ("" if share is None else f"{100 * share:.0f} %" for share in shares)
            cells = (on_one_line(one.name), f"{one.pairs:,}", f"{one.shared:,}", *shown)
            table.add_row(*(Text(cell, style=style) for cell in cells))
        console.print(table)
        hidden = len(check.annotators) - _SHOWN_ANNOTATORS
        say(
            console,
            "differs: from the other annotators of the same pairs; others: they among themselves"
            + (f". {hidden:,} more annotators: --json" if hidden > 0 else ""),
            style="dim",
        )
    if advise:
        say(console, f"Next: {check.advice}.")

"""`poprisk flips RUN_DIR`: the pairs whose label is probably wrong, and data without them."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from poprisk_integrations._imports import require
from poprisk_integrations.cli.clean import cleaning_of
from poprisk_integrations.cli.errors import UsageError, at_least
from poprisk_integrations.cli.flips.arguments import (
    add_data_arguments,
    check_data_arguments,
    flips_command,
)
from poprisk_integrations.cli.output import (
    NO_MATPLOTLIB,
    check_directory,
    say,
    write_figure,
)

__all__ = ["add_parser", "run"]

_FIGURE = "flip_report.png"
_TEXTS = ("prompt", "chosen", "rejected")
_SUFFIXES = (".jsonl", ".csv", ".parquet")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `flips` to the command line."""
    parser = subparsers.add_parser(
        "flips",
        help="pairs whose label is probably wrong, and data without them",
        description="Reads the flip report of a DPO run, prints the most suspect pairs and draws "
        f"{_FIGURE} beside it. With --write it also writes the data set without them, or with "
        "their labels exchanged. Of a run that swapped labels on purpose (flip_rate) it says how "
        "many of these the report found; it then makes the same swaps in --dataset, which is what "
        "the trainer saw.",
    )
    add = parser.add_argument
    add(
        "run_dir",
        type=Path,
        metavar="RUN_DIR",
        help="directory of a run or of `poprisk clean`, or a flip report (.csv or .parquet)",
    )
    add_data_arguments(parser, "to show and write pairs")
    add(
        "--top",
        type=at_least(0),
        default=20,
        metavar="N",
        help="pairs to show (default: %(default)s)",
    )
    add(
        "--min-probability",
        type=_probability,
        metavar="P",
        help="show no pair below it, and drop or swap from it on (default: show all, change from "
        "0.5 on)",
    )
    add("--write", type=Path, metavar="OUT", help="cleaned data: .jsonl, .csv or .parquet")
    add(
        "--mode",
        choices=("drop", "swap", "suggested"),
        help="what --write does to suspect pairs (default: drop); suggested: what the column "
        "'action' says, also in a flip_report.csv that you have edited and pass as RUN_DIR",
    )
    add("--force", action="store_true", help="let --write replace a file")
    add("--figure", type=Path, metavar="PNG", help="the picture to write instead")
    add("--quiet", action="store_true", help="print nothing but errors")
    add("--json", action="store_true", help="print JSON, and nothing else, to stdout")
    parser.set_defaults(run=run)


def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} must be in [0, 1]")
    return value


def run(args: argparse.Namespace) -> int:
    """Print, draw and write."""
    _check_arguments(args)
    require("transformers", "datasets", "trl", extra="trl")
    if args.figure is not None:
        require("matplotlib", extra="demo")
    from poprisk_integrations.cli.flips import study
    from poprisk_integrations.cli.flips.data import clean_data, load_data
    from poprisk_integrations.cli.flips.groups import group_pairs
    from poprisk_integrations.cli.flips.show import print_groups, print_pairs
    from poprisk_integrations.trl.flip_report import FlipReport

    directory = args.run_dir if args.run_dir.is_dir() else args.run_dir.parent
    cleaning = cleaning_of(directory)
    try:
        report = FlipReport.load(args.run_dir)
    except FileNotFoundError as error:
        if cleaning is None or cleaning == directory:
            raise UsageError(
                f"Invalid run_dir: {error}. PopRiskDPOTrainer and PopRiskRewardTrainer write one "
                "at the end of a run."
            ) from None
        directory = cleaning
        report = FlipReport.load(directory)
    swapped_rows = study.load_swapped_rows(directory, report)
    found, bins = None, None
    if swapped_rows is not None:
        found = study.flips_found(report, swapped_rows)
        bins = study.reliability_bins(report, swapped_rows)
    noise = study.load_noise(directory)
    top = report.top(args.top)
    pairs = top[top["probability_wrong"] >= (args.min_probability or 0.0)].to_dict("records")
    examples, written, groups = None, None, {}
    if args.dataset is not None:
        quiet = args.quiet or args.json
        dataset, rows = load_data(args, report, swapped_rows or set(), quiet=quiet)
        groups = group_pairs(report, dataset, rows, args.annotator_column)
        names = [name for name in _TEXTS if name in dataset.column_names]
        texts = dataset.select_columns(names)
        examples = [texts[row] for row in rows[: len(pairs)]]  # the report's order is that of rows
        if args.write is not None:
            written = clean_data(args, report, dataset, rows)
    elif pairs and all(pair.get("chosen") for pair in pairs):
        examples = [{name: pair[name] for name in _TEXTS} for pair in pairs]  # the report's own
    figure = args.figure or directory / _FIGURE
    scored = report.summary()["num_scored"]

    def draw() -> Any:
        from poprisk_integrations.cli.flips.picture import draw_flips  # needs matplotlib

        taken = "out of fold" if cleaning == directory else "before training"
        title = str(directory)
        return draw_flips(report, title, swapped_rows, groups=groups, bins=bins, taken=taken)

    drawn = bool(scored) and write_figure(figure, draw)
    ids = report.to_pandas()
    has_ids = ids["pair_id"].tolist() != ids["row"].tolist()
    command = flips_command(
        args.run_dir,
        args.dataset,
        id_column=args.id_column,
        has_ids=has_ids,
        config=args.dataset_config,
        split=args.split,
    )
    advice = report.advice(command, cleaned=cleaning is not None)
    if args.json:
        result = {
            "report": str(args.run_dir),
            "summary": report.summary(),
            "noise": noise,
            "study": found,
            "reliability": None if bins is None else [asdict(one) for one in bins],
            "groups": groups,
            "advice": asdict(advice),
            "top": [{**p, **e} for p, e in zip(pairs, examples or [{}] * len(pairs), strict=True)],
            "written": written,
            "figure": str(figure) if drawn else None,
        }
        print(json.dumps(result, indent=2, allow_nan=False, default=str))
    elif not args.quiet:
        from rich.console import Console

        console = Console()
        say(console, str(report))
        if noise is not None:
            say(console, study.noise_line(noise))
        if found is not None:
            say(console, study.study_line(found))
        if pairs:
            swapped = None if swapped_rows is None else [p["row"] in swapped_rows for p in pairs]
            print_pairs(console, pairs, examples, swapped)
        print_groups(console, groups, calibrated=report.calibrated)
        say(console, f"Next: {advice}." if written is None else _written_line(written))
        no_figure = NO_MATPLOTLIB if scored else "No picture: no pair has a probability."
        say(console, str(figure) if drawn else no_figure)
    return 0


def _check_arguments(args: argparse.Namespace) -> None:
    if args.figure is not None:
        check_directory("--figure", args.figure)
    check_data_arguments(args)
    if args.dataset is None and args.write is not None:
        raise UsageError("--write needs --dataset: the data that the trainer got.")
    if args.write is None:
        if args.mode is not None or args.force:
            raise UsageError(f"{'--mode' if args.mode else '--force'} is for --write.")
        return
    out = args.write
    if args.mode == "suggested" and args.min_probability is not None:
        raise UsageError("--mode suggested goes by the report's actions: no --min-probability.")
    if out.suffix not in _SUFFIXES:
        raise UsageError(f"Invalid --write: {str(out)!r}. Must end in {', '.join(_SUFFIXES)}.")
    check_directory("--write", out)
    if out.is_dir() or (out.exists() and not args.force):
        raise UsageError(f"Invalid --write: {str(out)!r} exists (--force replaces a file).")


def _written_line(written: dict[str, Any]) -> str:
    line = (
        f"{written['path']}: {written['pairs']} pairs, {written['dropped']} dropped, "
        f"{written['swapped']} swapped"
    )
    kept = written["columns_not_swapped"]
    return f"{line}; {', '.join(kept)} not swapped" if kept else line

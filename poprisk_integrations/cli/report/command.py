"""`poprisk report RUN_DIR ...`: what happened in a run, as a line, pictures and a page."""

import argparse
import json
import shutil
from pathlib import Path

from poprisk_integrations._imports import require
from poprisk_integrations.cli.errors import UsageError
from poprisk_integrations.cli.flips.arguments import add_data_arguments, check_data_arguments
from poprisk_integrations.cli.output import check_directory, writing
from poprisk_integrations.cli.recipes import recipes_root

__all__ = ["add_parser", "run"]

_PAGE, _COMPARISON = "poprisk_report.html", "poprisk_comparison.html"
_PLAYGROUND = "poprisk_playground.html"
_MOST_RUNS = 8


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `report` to the command line."""
    parser = subparsers.add_parser(
        "report",
        help="what happened in a run and why it stopped: a line, a picture and a page",
        description="Reads the text logs of a run of Trainer, TRL or Lightning: "
        "trainer_state.json, metrics.csv, poprisk_stop.json, poprisk_noise.json, flip_report.csv "
        "and settings beside them; never a pickle. Prints why the run ended, draws "
        f"poprisk_stop.png beside poprisk_stop.json, and writes {_PAGE}, one file that needs no "
        "network, with a PNG of all its charts. Several runs share their charts. With --dataset "
        "the page of a DPO run has the texts of the most suspect pairs, and says which annotators "
        "and lengths suspect labels come from. With --playground instead of a run: a page on what "
        "wrong labels do to a small network.",
    )
    parser.add_argument(
        "run_dir",
        type=Path,
        nargs="*",
        metavar="RUN_DIR",
        help="directory of a run, or one of its logs",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=f"the .html page to write instead of RUN_DIR/{_PAGE} (of several runs: "
        f"{_COMPARISON} in the first); all pictures then go beside it. With a .png: only that "
        "picture of the stop",
    )
    parser.add_argument(
        "--playground",
        action="store_true",
        help="without a RUN_DIR: write the noise playground, where wrong labels and the learning "
        f"rate can be chosen, to ./{_PLAYGROUND} or to --out",
    )
    add_data_arguments(parser, "to show the texts of suspect pairs")
    parser.add_argument("--json", action="store_true", help="print the report instead of lines")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print, draw and write; UsageError if a run or an output cannot be used."""
    given: list[Path] = args.run_dir
    out: Path | None = args.out
    if args.playground:
        return _write_playground(args)
    if not given:
        raise UsageError("Invalid run_dir: none given. Name a run, or give --playground.")
    if len(given) > _MOST_RUNS:
        raise UsageError(f"Invalid run_dir: {len(given)} of them; {_MOST_RUNS} fit a page.")
    if out is not None:
        _check_out(out, len(given))
    check_data_arguments(args)
    if args.dataset is not None and len(given) > 1:
        raise UsageError("Invalid --dataset: it is of one run. Name one RUN_DIR.")
    require("matplotlib", "pandas", "jinja2", "yaml", extra="demo")
    from poprisk_integrations.cli.report.findings import headline
    from poprisk_integrations.cli.report.page import as_json, stop_charts, write_page, write_stops
    from poprisk_integrations.cli.report.pair_texts import add_texts
    from poprisk_integrations.cli.report.sources import load_runs

    runs = load_runs(given)
    first = given[0] if given[0].is_dir() else given[0].parent
    page = out or first / (_PAGE if len(given) == 1 else _COMPARISON)
    is_page = page.suffix != ".png"
    one = runs[0]
    if args.dataset is not None:
        add_texts(one, args)
    if one.report is None and not is_page:
        no_report = "No poprisk_stop.json in it, so no picture of it."
        raise UsageError(f"Invalid run_dir: {str(given[0])!r}. {no_report}")
    is_all = (len(runs) == 1 and not one.curves) or not is_page  # what the report says
    if one.report is not None and is_all and not stop_charts(one):
        reason = one.report["reason"]
        raise UsageError(f"{str(one.report_path)!r} has no window to show: {reason}.")
    written = write_stops(runs, out)
    written += write_page(runs, page) if is_page else []
    if args.json:
        print(json.dumps(as_json(runs, page if is_page else None, written), allow_nan=False))
        return 0
    for one in runs:
        line = one.stop.verdict if one.report is not None and one.stop else headline(one)
        print(f"{one.name}: {line}" if len(runs) > 1 else line)
    for path in [*written, *([page] if is_page else [])]:
        print(path)
    return 0


def _write_playground(args: argparse.Namespace) -> int:
    """The page as it was shipped: its runs were made beforehand."""
    if args.run_dir:
        raise UsageError("Invalid --playground: it is about no run. Leave RUN_DIR out.")
    out: Path = args.out or Path(_PLAYGROUND)
    _check_out(out, 1)
    if out.suffix == ".png":
        raise UsageError(f"Invalid --out: {str(out)!r}. The playground is an .html page.")
    source = recipes_root() / "playground" / "playground.html"
    if not source.is_file():
        raise UsageError(f"no playground at {str(source)!r}")
    with writing(out) as temporary:
        shutil.copyfile(source, temporary)
    print(json.dumps({"page": str(out)}) if args.json else out)
    return 0


def _check_out(out: Path, num_runs: int) -> None:
    if out.suffix not in (".html", ".htm", ".png"):
        raise UsageError(f"Invalid --out: {str(out)!r}. Must end in .html, or .png.")
    if out.suffix == ".png" and num_runs > 1:
        raise UsageError("Invalid --out: a .png of the stop is of one run. Name an .html.")
    check_directory("--out", out)
    if out.is_dir():
        raise UsageError(f"Invalid --out: {str(out)!r} is a directory.")

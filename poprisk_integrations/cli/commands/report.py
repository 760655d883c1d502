"""`poprisk report RUN_DIR ...`: what happened in a run, as a line, a picture and a page."""

import argparse
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poprisk_integrations._imports import require
from poprisk_integrations.cli.errors import UsageError
from poprisk_integrations.cli.output import writing
from poprisk_integrations.cli.recipe_index import recipes_root
from poprisk_integrations.cli.report.findings import headline, key_figures, sentences
from poprisk_integrations.cli.report.run import Run, load_runs
from poprisk_integrations.cli.report.sections import sections_of
from poprisk_integrations.cli.report.stop_file import drawable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
        "network, with a PNG of all its charts. Several runs share their charts. With "
        "--playground instead of a run: a page on what wrong labels do to a small network.",
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
    parser.add_argument("--json", action="store_true", help="print the report instead of lines")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print, draw and write.

    Raises:
        UsageError: If a run or an output cannot be used.
        ImportError: If matplotlib is missing.
    """
    out: Path | None = args.out
    if args.playground:
        return _write_playground(args)
    if not args.run_dir:
        raise UsageError("Invalid run_dir: none given. Name a run, or give --playground.")
    if len(args.run_dir) > _MOST_RUNS:
        raise UsageError(f"Invalid run_dir: {len(args.run_dir)} of them; {_MOST_RUNS} fit a page.")
    if out is not None:
        _check_out(out, len(args.run_dir))
    runs = load_runs(args.run_dir)
    if out is not None and out.suffix == ".png" and not _has_windows(runs[0]):
        raise UsageError(_no_picture(runs[0], args.run_dir[0]))
    if len(runs) == 1 and not runs[0].curves and not _has_windows(runs[0]) and runs[0].report:
        raise UsageError(_no_picture(runs[0], args.run_dir[0]))  # there is nothing but this file
    require("matplotlib", extra="demo")
    pictures = _draw_stops(runs, out)
    page = None
    if out is None or out.suffix != ".png":
        page = out or _default_page(args.run_dir, runs)
        pictures += _write_page(runs, page)
    if args.json:
        print(json.dumps(_as_json(runs, page, pictures), allow_nan=False))
        return 0
    for one in runs:
        name = f"{one.name}: " if len(runs) > 1 else ""
        print(f"{name}{_line(one)}")
    for path in [*pictures, *([page] if page is not None else [])]:
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
    if not out.parent.is_dir():
        raise UsageError(f"Invalid --out: {str(out)!r}. Its directory does not exist.")
    if out.is_dir():
        raise UsageError(f"Invalid --out: {str(out)!r} is a directory.")


def _has_windows(one: Run) -> bool:
    return bool(one.report and one.report["history"])


def _no_picture(one: Run, given: Path) -> str:
    if one.report is None:
        return f"Invalid run_dir: {str(given)!r}. No poprisk_stop.json in it, so no picture of it."
    return f"{str(one.report_path)!r} has no window to show: {one.report['reason']}."


def _default_page(given: Sequence[Path], runs: Sequence[Run]) -> Path:
    first = given[0] if given[0].is_dir() else given[0].parent
    return first / (_PAGE if len(runs) == 1 else _COMPARISON)


def _draw_stops(runs: Sequence[Run], out: Path | None) -> list[Path]:
    """One picture for each report of a stop, as before there was a page."""
    from poprisk_integrations.cli.report.draw import drawing
    from poprisk_integrations.cli.stop_figure import draw_stop

    written = []
    for index, one in enumerate(runs):
        if one.report_path is None or one.report is None or not _has_windows(one):
            continue
        path = one.report_path.with_suffix(".png")
        if out is not None:
            number = f"_{index + 1}" if len(runs) > 1 else ""
            path = out if out.suffix == ".png" else out.with_name(f"{out.stem}_stop{number}.png")
        with drawing():
            _write_png(path, draw_stop(drawable(one.report), str(one.report_path.parent)))
        written.append(path)
    return written


def _write_page(runs: Sequence[Run], page: Path) -> list[Path]:
    """The page, and beside it a PNG of its charts, if it has any."""
    from poprisk_integrations.cli.report.draw import draw_overview, drawing
    from poprisk_integrations.cli.report.page import page_of

    sections = sections_of(runs)
    text = page_of(runs, sections)
    charts = [chart for section in sections for chart in section.charts]
    pictures = [page.with_suffix(".png")] if charts else []
    for picture in pictures:
        with drawing():
            _write_png(picture, draw_overview(charts, ", ".join(one.name for one in runs)))
    with writing(page) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return pictures


def _write_png(path: Path, figure: "Figure") -> None:
    with writing(path) as temporary:
        figure.savefig(temporary, format="png")


def _line(one: Run) -> str:
    return one.stop.verdict if one.report is not None and one.stop is not None else headline(one)


def _as_json(runs: Sequence[Run], page: Path | None, pictures: Sequence[Path]) -> dict[str, Any]:
    """Of one run its `poprisk_stop.json`, and more; of several the same under "runs"."""
    figures = key_figures(runs)
    found: list[dict[str, Any]] = [
        {
            **(one.report or {}),
            "run": str(one.directory),
            "headline": headline(one),
            "sentences": sentences(one),
            "figures": {name: values[index] for name, values in figures},
        }
        for index, one in enumerate(runs)
    ]
    written = {"page": None if page is None else str(page), "pictures": [str(p) for p in pictures]}
    whole = {**found[0], **written} if len(runs) == 1 else {"runs": found, **written}
    cleaned: dict[str, Any] = _finite(whole)
    return cleaned


def _finite(value: Any) -> Any:
    """JSON knows no NaN."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

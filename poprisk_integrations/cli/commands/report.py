"""`poprisk report RUN_DIR`: why a run was stopped, in one line and one picture."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from poprisk_integrations._imports import require
from poprisk_integrations.cli.errors import UsageError

__all__ = ["add_parser", "find_report", "load_report", "run"]

_NAME = "poprisk_stop.json"


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `report` to the command line."""
    parser = subparsers.add_parser(
        "report",
        help="why a run was stopped: one line and a picture",
        description=f"Reads the {_NAME} that the early-stopping callbacks write, prints why the "
        "run ended and draws poprisk_stop.png beside it.",
    )
    parser.add_argument("run_dir", type=Path, help=f"directory of a run, or a {_NAME}")
    parser.add_argument("--out", type=Path, help="the PNG to write instead")
    parser.add_argument("--json", action="store_true", help="print the report instead of a line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print and draw."""
    source = find_report(args.run_dir)
    report = load_report(source)
    require("matplotlib", extra="demo")
    from poprisk_integrations.cli.stop_figure import draw_stop

    out = args.out or source.with_suffix(".png")
    if not out.parent.is_dir():
        raise UsageError(f"Invalid --out: {str(out)!r}. Its directory does not exist.")
    figure = draw_stop(report, str(source.parent))
    temporary = out.with_name(f"{out.name}.tmp")
    figure.savefig(temporary, format="png")
    os.replace(temporary, out)
    print(json.dumps(report) if args.json else f"{report['reason']}\n{out}")
    return 0


def find_report(path: Path) -> Path:
    """The report of a run; the newest where a directory holds several, at any depth.

    Raises:
        UsageError: If there is none.
    """
    if path.is_file():
        return path
    found = sorted(path.rglob("poprisk_stop*.json"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise UsageError(
            f"Invalid run_dir: {str(path)!r}. No {_NAME} in it: the run had no early-stopping "
            "callback of this package, or has not ended yet."
        )
    return found[-1]


def load_report(path: Path) -> dict[str, Any]:
    """Content of a report with at least one window.

    Raises:
        UsageError: If it is no such report.
    """
    try:
        report: Any = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"Invalid run_dir: {str(path)!r} is not JSON ({error}).") from None
    rows = report.get("history") if isinstance(report, dict) else None
    if not isinstance(rows, list) or "reason" not in report:
        raise UsageError(f"Invalid run_dir: {str(path)!r} is not a report of a stop.")
    if not rows:
        raise UsageError(f"{str(path)!r} has no window to show: {report['reason']}.")
    if not all(isinstance(row, dict) and "step" in row for row in rows):
        raise UsageError(f"Invalid run_dir: {str(path)!r} is not a report of a stop.")
    found: dict[str, Any] = report
    return found

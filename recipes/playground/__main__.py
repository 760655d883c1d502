"""The noise playground: runs, their table, and the page; what it shows is in README.md.

Usage, from `recipes/`: python -m playground [--quick | --page] [--out DIR]
Resumable: a trace that exists in build/ is read back.
"""

import argparse
from pathlib import Path

import torch
from benchmarks.harness.provenance import write_csv
from playground.page import page_of
from playground.runs import FULL, QUICK, run_rows
from playground.table import read_runs

HERE = Path(__file__).parent


def main() -> None:
    """Train what is missing, write the table and the page."""
    parser = argparse.ArgumentParser("python -m playground", description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--traces", type=Path, help="of the runs; OUT/build by default")
    parser.add_argument("--page", action="store_true", help="only the page, from the table")
    parser.add_argument("--quick", action="store_true", help="few and short runs, for tests")
    args = parser.parse_args()
    table = args.out / "results" / "runs.csv"
    if not args.page:
        torch.set_num_threads(1)
        plan = QUICK if args.quick else FULL
        write_csv(table, run_rows(plan, args.traces or args.out / "build"))
    page = args.out / "playground.html"
    page.write_text(page_of(read_runs(table)), encoding="utf-8")
    print(f"{page}: {page.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

"""Preference learning with wrong labels: tuned, at default settings, over learning rates.

Usage: python recipes/benchmarks/noisy_dpo/bench.py [--jobs N] [--only A1,A9] [--quick]
       python recipes/benchmarks/noisy_dpo/bench.py --from-csv FILE
Resumable: a run that exists is not made again. See README.md for the rules.
"""

import argparse
import sys
from pathlib import Path

import torch
from figures import draw
from grid import Cell, cells, run_all
from rows import rows_of_folder
from runs import read
from scores import lines_of
from tables import text_of
from verdict import verdict

sys.path.insert(0, str(Path(__file__).parents[1]))
from reporting import read_csv, result_name, write_csv

HERE = Path(__file__).parent


def main() -> None:
    """Train what is missing, write the results and the plot, print tables and verdict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--runs", type=Path, default=HERE / "runs")
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--only", default="", help="arms to train, with commas between")
    parser.add_argument("--show", default="", help="arms in the tables; all by default")
    parser.add_argument("--score-only", action="store_true", help="train nothing")
    parser.add_argument("--from-csv", type=Path, help="tables of a results file; trains nothing")
    parser.add_argument("--quick", action="store_true", help="three arms, tiny sizes, for tests")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.from_csv is None:
        rows = measure(args)
        path = args.out / f"{result_name()}.csv"
        write_csv(path, rows)
        # What is reported is made from the file, so that anyone can make it again.
        draw(read(read_csv(path)), path.with_suffix(".png"))
    else:
        path = args.from_csv
    lines = lines_of(read(read_csv(path)))
    if not args.quick and args.from_csv is None:
        write_csv(path.with_name(f"summary_{path.name}"), lines)
    print(text_of(lines, [arm for arm in args.show.split(",") if arm]))
    print("\nquick form: no verdict" if args.quick else "\n".join(["", *verdict(lines)]))


def measure(args: argparse.Namespace) -> list[dict]:
    """Rows of the results file, after the runs that were missing."""
    folder = args.out / "runs" if args.quick else args.runs
    wanted = list(quick_cells() if args.quick else cells())
    if args.only:
        wanted = [cell for cell in wanted if cell.arm in args.only.split(",")]
    if not args.score_only:
        run_all(wanted, folder, args.jobs)
    return rows_of_folder(folder)


def quick_cells() -> list[Cell]:
    """One selection seed and a fresh one, two epochs."""
    return [
        Cell(arm=arm, lr=lr, seeds=(100, 0), epochs=(1, 2), quick=True)
        for arm in ("A1", "A9", "E1")
        for lr in (3e-4, 1e-3)
    ]


if __name__ == "__main__":
    main()

"""Outside the scores: is a gain one of a rate between those of the grid, and is 1e-2 an edge?

Usage: python recipes/benchmarks/small_lm/small_lm_checks.py [--out DIR] [--traces DIR]
"""

import argparse
import sys
from pathlib import Path

import torch
from bench import HERE, METRICS, joined, train_seed

sys.path.insert(0, str(Path(__file__).parents[1]))
from gate_harness.scores import member_rows
from reporting import hardware, write_csv

__all__ = ["CHECKS"]

CHECKS = (  # arm, rate, seeds
    ("AdamW", 1.7e-3, (0, 1, 2)),
    ("soft-32", 1.7e-3, (0,)),
    ("soft-5", 3e-2, (0,)),
    ("paper", 3e-2, (0,)),
)


def main() -> None:
    """Train what is missing, write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--traces", type=Path, default=HERE / "traces")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for arm, lr, seeds in CHECKS:
        folder = args.traces / "400k" / f"lr_{lr:g}"
        trace = joined([train_seed(arm, s, [lr], "400k", "cpu", folder) for s in seeds])
        rows += member_rows(arm, trace, METRICS)
        write_csv(args.out / f"checks_{hardware()}.csv", rows)


if __name__ == "__main__":
    main()

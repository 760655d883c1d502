"""Which gate is the default: reads the studies' scores, applies the rule of README.md.

Usage: python recipes/benchmarks/default_gate/bench.py [--out DIR] [--quick]
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from choice import candidates, choose, confirmation, options
from default_figures import draw
from gate_harness.comparison import comparisons, read_scores
from reporting import result_name, write_csv

HERE = Path(__file__).parent
BENCHMARKS = HERE.parent
SELECTION = ("sparse_signal", "noisy_labels", "small_lm")
CONFIRMATION = ("sparse_signal", "noisy_labels", "small_lm", "pinn", "inr")


def main() -> None:
    """Compare all arms with AdamW, choose, confirm, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--quick", action="store_true", help="fewer resamples, for tests")
    args = parser.parse_args()
    draws = 500 if args.quick else 10_000
    selection = read_scores(BENCHMARKS, SELECTION, "selection_scores")
    report = read_scores(BENCHMARKS, CONFIRMATION, "scores")
    rows = [
        {"stage": stage, **row}
        for stage, scores in (("selection", selection), ("confirmation", report))
        for row in comparisons(scores, draws)
    ]
    path = args.out / f"{result_name()}.csv"
    write_csv(path, rows)
    draw(rows, path.with_suffix(".png"))
    lines, chosen = choose(rows, selection, draws)
    more = options(rows, selection, chosen, draws)
    for line in [*candidates(rows), *lines, *more, *confirmation(rows, chosen)]:
        print(line)


if __name__ == "__main__":
    main()

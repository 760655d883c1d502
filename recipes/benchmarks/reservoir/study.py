"""What readers of the method asked for: spectrum, pruning, a jump to the end, the time of grokking.

See README.md for the decision rule. One file for each question; a table that exists is read back.
"""

import argparse
import time

from benchmarks.harness.provenance import hardware, read_csv, result_name, write_csv
from benchmarks.reservoir import grokking_time, heads, pruning, spectrum
from benchmarks.reservoir.judged import line

TAKES = ("seeds",)
SEEDS = (0, 1, 2, 3, 4)
QUESTIONS = {
    "spectrum": spectrum.rows,
    "identity": spectrum.identity_rows,
    "pruning": pruning.rows,
    "heads": heads.rows,
    "grokking": grokking_time.rows,
}
PICTURES = {"pruning": pruning.draw, "heads": heads.draw, "grokking": grokking_time.draw}


def main(args: argparse.Namespace) -> list[str]:
    """Run what is missing, write tables and pictures; the comparisons of the rule."""
    seeds = args.seeds or ((100,) if args.quick else SEEDS)
    found = {}
    for name, run in QUESTIONS.items():
        path = args.out / f"{name}_{hardware()}.csv"
        if not path.exists():
            began = time.monotonic()
            write_csv(path, run(seeds, quick=args.quick))
            print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
        found[name] = read_csv(path)
    table = comparisons(found)
    write_csv(args.out / f"{result_name()}.csv", table)
    spectrum.draw(found["spectrum"], args.out / f"{result_name()}.png")
    for name, draw in PICTURES.items():
        draw(found[name], args.out / f"{name}_{hardware()}.png")
    said = "{question} {condition}: {what} {mean} [{low}, {high}] {word}"
    return [said.format(**row).rstrip() for row in table]


def comparisons(found: dict[str, list[dict]]) -> list[dict]:
    """The committed table of verdicts, from the tables of the questions."""
    compared = {
        "a": spectrum.compare(found["spectrum"], found["identity"]),
        "b": pruning.compare(found["pruning"]),
        "c": heads.compare(found["heads"]),
        "d": grokking_time.compare(found["grokking"]),
    }
    return [line(question, *one) for question, those in compared.items() for one in those]

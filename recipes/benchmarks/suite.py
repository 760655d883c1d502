"""All studies of the gate, one after another, with the time that each took.

Usage: python recipes/benchmarks/suite.py [--quick] [--out DIR] [--only STUDY ...]

Writes each study to DIR/<study> (default: the studies' own folders) and `suite_*.csv`, a row each
with wall and CPU seconds, after every study. Traces that exist are read back, so the times are
those of what was missing: for a whole run choose an empty DIR. It stops at the first failure.
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from reporting import hardware, write_csv

HERE = Path(__file__).parent
# What reports, in this order; where a study chooses on other seeds, that too.
COMMANDS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("sparse_signal", "bench.py", ("--selection",)),
    ("sparse_signal", "bench.py", ()),
    ("noisy_labels", "bench.py", ("--selection",)),
    ("noisy_labels", "bench.py", ()),
    ("small_lm", "bench.py", ("--selection",)),
    ("small_lm", "bench.py", ()),
    ("pinn", "bench.py", ()),
    ("inr", "bench.py", ()),
    ("where_it_hurts", "bench.py", ("--arms", "soft-32", "snr-32")),
    ("grokking", "bench.py", ()),
    ("grokking", "equal.py", ()),
    ("risk_estimate", "bench.py", ()),
    ("small_lm", "bench.py", ("--size", "400k")),
    ("default_gate", "bench.py", ()),
)


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="needed with --quick")
    parser.add_argument("--quick", action="store_true", help="each study's toy, in seconds")
    parser.add_argument("--only", nargs="+", choices=sorted({study for study, _, _ in COMMANDS}))
    args = parser.parse_args()
    if args.quick and args.out is None:
        parser.error("--quick writes toys: name a folder with --out")
    rows: list[dict] = []
    for study, script, options in COMMANDS:
        if args.only and study not in args.only:
            continue
        if args.quick and (options or script != "bench.py"):
            continue
        line = [str(HERE / study / script), *(["--quick"] if args.quick else options)]
        if args.out is not None:
            line += ["--out", str(args.out / study)]
            if not args.quick and study != "default_gate":
                line += ["--traces", str(args.out / study / "traces" / script.split(".")[0])]
        rows.append(timed(study, line))
        write_csv((args.out or HERE) / f"suite_{hardware()}.csv", rows)
        print("{study} {options}: {wall_s} s, {cpu_s} s of CPU".format(**rows[-1]), flush=True)
    total = sum(float(row["wall_s"]) for row in rows)
    print(f"all: {total / 60:.1f} minutes")


def timed(study: str, line: list[str]) -> dict:
    """Run a study's script; its wall and CPU seconds."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run([sys.executable, *line], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    kind = [
        part for part in line[1:] if part.startswith("--") and part not in ("--out", "--traces")
    ]
    return {
        "study": study,
        "options": " ".join([Path(line[0]).name, *kind]),
        "wall_s": f"{time.monotonic() - began:.0f}",
        "cpu_s": f"{cpu:.0f}",
    }


if __name__ == "__main__":
    main()

"""All studies of the gate, with the time that each took.

Usage: python recipes/benchmarks/suite.py [--quick] [--out DIR] [--jobs N] [--only STUDY ...]

Writes each study to DIR/<study> (default: the studies' own folders) and `suite_*.csv`, a row each
with wall and CPU seconds, after every study. Traces that exist are read back, so the times are
those of what was missing: for a whole run choose an empty DIR. After a failure nothing more
begins.
"""

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from reporting import hardware, write_csv

HERE = Path(__file__).parent
LAST = "default_gate"  # reads what the others wrote
# The longest first; where a study chooses on other seeds, that too.
COMMANDS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("small_lm", "bench.py", ()),
    ("grokking", "bench.py", ()),
    ("grokking", "equal.py", ()),
    ("pinn", "bench.py", ()),
    ("inr", "bench.py", ()),
    ("small_lm", "bench.py", ("--selection",)),
    ("small_lm", "bench.py", ("--size", "400k")),
    ("risk_estimate", "bench.py", ()),
    ("noisy_labels", "bench.py", ("--selection",)),
    ("noisy_labels", "bench.py", ()),
    ("where_it_hurts", "bench.py", ("--arms", "soft-32", "snr-32")),
    ("sparse_signal", "bench.py", ("--selection",)),
    ("sparse_signal", "bench.py", ()),
    ("default_gate", "bench.py", ()),
)


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="needed with --quick")
    parser.add_argument("--quick", action="store_true", help="each study's toy, in seconds")
    parser.add_argument("--jobs", type=int, default=1, help="studies at the same time")
    parser.add_argument("--only", nargs="+", choices=sorted({study for study, _, _ in COMMANDS}))
    args = parser.parse_args()
    if args.quick and args.out is None:
        parser.error("--quick writes toys: name a folder with --out")
    quick: set[str] = set()  # one toy for each study
    lines = {False: [], True: []}  # by whether it must wait for the others
    for study, script, options in COMMANDS:
        if args.only and study not in args.only:
            continue
        if args.quick and study in quick:
            continue
        quick.add(study)
        line = [str(HERE / study / script), *(["--quick"] if args.quick else options)]
        if args.out is not None:
            line += ["--out", str(args.out / study)]
            if not args.quick and study != LAST:
                line += ["--traces", str(args.out / study / "traces" / script.split(".")[0])]
        lines[study == LAST].append((study, line))
    table = (args.out or HERE) / f"suite_{hardware()}.csv"
    rows: list[dict] = []
    began = time.monotonic()
    for waiting in (False, True):
        with ThreadPoolExecutor(args.jobs) as pool:
            jobs = [pool.submit(timed, study, line) for study, line in lines[waiting]]
            try:
                for job in as_completed(jobs):
                    rows.append(job.result())
                    write_csv(table, rows)
                    print("{study} {options}: {wall_s} s, {cpu_s} s of CPU".format(**rows[-1]))
            except RuntimeError:
                pool.shutdown(cancel_futures=True)
                raise
    print(f"all: {(time.monotonic() - began) / 60:.1f} minutes")


def timed(study: str, line: list[str]) -> dict:
    """Run a study's script on one thread; its wall and CPU seconds.

    Raises:
        RuntimeError: If it fails.
    """
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *line],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    _, status, used = os.wait4(process.pid, 0)  # CPU time of this child alone
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(line)} ended with {process.returncode}")
    kind = [part for part in line[1:] if part in ("--quick", "--selection", "--size")]
    return {
        "study": study,
        "options": " ".join([Path(line[0]).name, *kind]),
        "wall_s": f"{time.monotonic() - began:.0f}",
        "cpu_s": f"{used.ru_utime + used.ru_stime:.0f}",
    }


if __name__ == "__main__":
    main()

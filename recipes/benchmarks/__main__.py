"""One study, all of them, or the page of their verdicts; run from `recipes/`.

python -m benchmarks NAME [--quick] [--out DIR] [--jobs N] ...  NAME --help: what it takes beside
python -m benchmarks all --out DIR [--quick] [--jobs N]         with the time that each took
python -m benchmarks --summary                                  writes benchmarks/README.md
"""

import argparse
import importlib
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from benchmarks.harness.provenance import BENCHMARKS, hardware, write_csv
from benchmarks.summary import page

OPTIONS = {  # what a study may take beside --quick, --out and --jobs
    "selection": {"action": "store_true", "help": "on the seeds that choices were made on"},
    "arms": {"nargs": "+", "default": [], "help": "further ones, or these only: see the README"},
    "seeds": {"nargs": "+", "type": int, "help": "instead of the usual ones"},
    "traces": {"type": Path, "help": "folder of the runs; one that exists is read back"},
    "only": {"nargs": "+", "help": "conditions, instead of all"},
    "size": {"help": "of the model"},
    "device": {"default": "cpu", "help": "of the model"},
    "part": {"help": "a table of its own: see the README"},
}
LAST = "default_gate"  # reads what the others wrote
MORE = (  # of studies that choose on other seeds, or have another size
    ("noisy_labels", "--selection"),
    ("sparse_signal", "--selection"),
    ("small_lm", "--selection"),
    ("small_lm", "--size", "400k"),
)


def studies() -> list[str]:
    """Those that are run here; of a frozen one the README names the commit that runs it."""
    return sorted(path.parent.name for path in BENCHMARKS.glob("*/study.py"))


def main() -> None:
    """Command line."""
    words = sys.argv[1:]
    if words and words[0] in studies():
        _one(words[0], words[1:])
        return
    parser = argparse.ArgumentParser(
        "python -m benchmarks",
        usage=__doc__,
        description=f"NAME: one of {', '.join(studies())}.",
    )
    parser.add_argument("name", nargs="?", choices=[*studies(), "all"], help=argparse.SUPPRESS)
    parser.add_argument("--summary", action="store_true", help="write README.md of the folder")
    parser.add_argument("--out", type=Path, help="folder of all results")
    parser.add_argument("--quick", action="store_true", help="each study's toy, in seconds")
    parser.add_argument("--jobs", type=int, default=1, help="studies at the same time")
    args = parser.parse_args(words)
    if args.summary:
        (BENCHMARKS / "README.md").write_text(page(), encoding="utf-8")
    elif args.name != "all":
        parser.error(f"name a study first: {', '.join(studies())}, or all")
    elif args.out is None:
        parser.error("all needs --out DIR")
    else:
        everything(args.out, quick=args.quick, jobs=args.jobs)


def _one(name: str, words: list[str]) -> None:
    study = importlib.import_module(f"benchmarks.{name}.study")
    parser = argparse.ArgumentParser(f"python -m benchmarks {name}", description=study.__doc__)
    parser.add_argument("--quick", action="store_true", help="a toy, in seconds")
    parser.add_argument("--out", type=Path, help="folder of the results, the study's by default")
    parser.add_argument("--jobs", type=int, default=1, help="processes, where it can use them")
    for option in study.TAKES:
        parser.add_argument(f"--{option}", **OPTIONS[option])
    args = parser.parse_args(words)
    if args.quick and args.out is None:
        parser.error("--quick writes a toy: name a folder with --out")
    args.out = args.out or BENCHMARKS / name / "results"
    parts = getattr(study, "PARTS", ())
    if getattr(args, "part", None) not in (None, *parts):
        parser.error(f"Invalid --part: {args.part!r}. One of {list(parts)}.")
    for line in study.main(args):
        print(line)


def everything(out: Path, *, quick: bool, jobs: int, names: list[str] | None = None) -> None:
    """All studies, each to OUT/NAME, with their times in `suite_*.csv`.

    Traces that exist are read back, so the times are those of what was missing: for a whole run
    choose an empty folder. After a failure nothing more begins.
    """
    runs = [(name,) for name in names or studies()]
    runs += [] if quick else [run for run in MORE if (run[0],) in runs]
    rows: list[dict] = []
    began = time.monotonic()
    for waiting in (False, True):
        with ThreadPoolExecutor(jobs) as pool:
            started = [
                pool.submit(_timed, run, out / run[0], quick)
                for run in runs
                if (run[0] == LAST) == waiting
            ]
            try:
                for job in as_completed(started):
                    rows.append(job.result())
                    write_csv(out / f"suite_{hardware()}.csv", rows)
                    print("{study} {options}: {wall_s} s, {cpu_s} s of CPU".format(**rows[-1]))
            except RuntimeError:
                pool.shutdown(cancel_futures=True)
                raise
    print(f"all: {(time.monotonic() - began) / 60:.1f} minutes")


def _timed(run: tuple[str, ...], out: Path, quick: bool) -> dict:
    """Run a study on one thread; its wall and CPU seconds."""
    name, *options = run
    options += ["--quick"] if quick else []
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks", name, *options, "--out", str(out)],
        stdout=subprocess.DEVNULL,
        cwd=BENCHMARKS.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    _, status, used = os.wait4(process.pid, 0)  # CPU time of this child alone
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join([name, *options])} ended with {process.returncode}")
    return {
        "study": name,
        "options": " ".join(options),
        "wall_s": f"{time.monotonic() - began:.0f}",
        "cpu_s": f"{used.ru_utime + used.ru_stime:.0f}",
    }


if __name__ == "__main__":
    main()

"""`poprisk demo`: the main job on an embedded default, offline, on the CPU."""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from poprisk_integrations._imports import require
from poprisk_integrations.cli.errors import UsageError
from poprisk_integrations.cli.output import held_back, write_figure, writing

__all__ = ["add_parser", "run"]


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `demo` to the command line."""
    parser = subparsers.add_parser(
        "demo",
        help="check, suspects and four models of DPO with wrong labels, in minutes, offline",
        description="Fine-tunes a small language model on text that ships with Python, makes "
        "preference pairs of which 30 % are swapped, checks them, judges them with models that "
        "never saw them, and trains with DPO: AdamW to the end, AdamW with a tenth held out, "
        "PopRiskDPOTrainer (PopRiskAdamW and the stop), and the mean of the judging models. Prints "
        "tables, what they show and what one would do now, and writes results.json and report.png. "
        "Under 5 minutes on 2 cores; no network, no accelerator.",
    )
    parser.add_argument("--quick", action="store_true", help="a check in under a minute")
    parser.add_argument(
        "--out", default="poprisk_demo", metavar="DIR", help="where to write (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of all that is random (default: %(default)s)"
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    parser.add_argument(
        "--json", action="store_true", help="print the results as JSON, and nothing else, to stdout"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the job, write `results.json` and `report.png`, print what it shows."""
    if not 0 <= args.seed < 2**31:
        raise UsageError(f"--seed {args.seed}: must be from 0 to {2**31 - 1}.")
    require("transformers", "datasets", "trl", "tokenizers", "matplotlib", extra="demo")
    directory = Path(args.out)
    _require_writable(directory)

    from rich.console import Console

    errors = Console(file=sys.stderr)  # before the output of the libraries is held back
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is on the hub
    if not args.quiet:
        errors.print("loading the libraries ...", style="dim")
    from poprisk_integrations.cli.demo.progress import JobProgress
    from poprisk_integrations.cli.demo.settings import FULL, QUICK

    settings = QUICK if args.quick else FULL
    swapped = f"{100 * settings.swapped_share:.0f} %"
    with held_back():
        from poprisk_integrations.cli.demo.job import phase_weights, run_job
        from poprisk_integrations.cli.demo.show import draw, print_results

        progress = JobProgress(phase_weights(settings), None if args.quiet else errors)
        with progress.shown():
            result = run_job(settings, seed=args.seed, quick=args.quick, progress=progress)
        record = json.dumps(result.record, indent=2, allow_nan=False)
        with writing(directory / "results.json") as temporary:  # minutes of work: before all else
            temporary.write_text(f"{record}\n", encoding="utf-8")
        data = result.record["data"]
        subtitle = (
            f"{data['train_pairs']} training pairs, {swapped} swapped; {data['heldout_pairs']} "
            f"clean held-out pairs; {data['model_parameters'] / 1e6:.2f}M parameters; seed "
            f"{args.seed}"
        )
        write_figure(directory / "report.png", lambda: draw(result, subtitle))
    if args.json:
        print(record)
    elif not args.quiet:
        console = Console()
        print_results(console, result, f"{swapped} of the training labels are swapped")
        console.print(f"\nWrote {directory / 'results.json'} and {directory / 'report.png'}")
    return 0


def _require_writable(directory: Path) -> None:
    """Create the directory if need be and prove that files can be written to it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(b"x")
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(
            f"--out {directory}: cannot write there ({reason}). Choose another directory."
        ) from error

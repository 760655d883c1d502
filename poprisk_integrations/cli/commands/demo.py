"""`poprisk demo`: the main job on an embedded default, offline, on the CPU."""

import argparse

__all__ = ["add_parser", "run"]


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `demo` to the command line."""
    parser = subparsers.add_parser(
        "demo",
        help="AdamW beside PopRiskAdamW on DPO with wrong labels, in minutes, offline",
        description="Fine-tunes a small language model on text that ships with Python, then runs "
        "DPO on preferences of which 30 % are swapped: AdamW and PopRiskAdamW, with and without "
        "the stop, at three learning rates. Prints a table and what it shows, and writes "
        "results.json and report.png. Under 5 minutes on 2 cores; no network, no accelerator.",
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
    """Run the demo.

    Raises:
        UsageError: If `--seed` is out of range or `--out` cannot be written.
        ImportError: If the packages of the `[demo]` extra are missing.
    """
    from poprisk_integrations._imports import require
    from poprisk_integrations.cli.demo.output_files import prepare_directory
    from poprisk_integrations.cli.errors import UsageError

    if not 0 <= args.seed < 2**31:
        raise UsageError(f"--seed {args.seed}: must be from 0 to {2**31 - 1}.")
    require("transformers", "datasets", "trl", "tokenizers", "matplotlib", extra="demo")
    directory = prepare_directory(args.out)

    from poprisk_integrations.cli.demo.present import run_and_write

    run_and_write(directory, quick=args.quick, seed=args.seed, quiet=args.quiet, as_json=args.json)
    return 0

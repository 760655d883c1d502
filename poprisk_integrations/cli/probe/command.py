"""`poprisk probe`: a few steps of a training tell what a gate or a stop would do to it."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from poprisk_integrations._imports import require
from poprisk_integrations.cli.errors import UsageError, at_least
from poprisk_integrations.cli.output import (
    NO_MATPLOTLIB,
    check_directory,
    progress_bar,
    say,
    write_figure,
)
from poprisk_integrations.diagnostics.probe import SHORTEST_PROBE

__all__ = ["add_parser", "run"]

_FIGURE, _LR_FIGURE = "poprisk_probe.png", "poprisk_lr.png"


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `probe` to the command line."""
    parser = subparsers.add_parser(
        "probe",
        help="a few steps of your training tell what a gate or a stop would do",
        usage="poprisk probe MODULE:NAME [OPTION ...]\n"
        "       poprisk probe --config CONFIG.yaml [OPTION ...] [--KEY VALUE ...]",
        description="Runs some steps of a training as it is, reads its gradients, and ends it. "
        "MODULE:NAME (or FILE.py:NAME) is a LightningModule class, or a function without "
        "arguments that trains with any torch optimizer; CONFIG.yaml is one of `poprisk dpo`. "
        "Prints signal-to-noise ratios per layer, the noise scale, what each alpha of the gate "
        "would let pass, whether the stop can work, and what to do, in two sentences; draws "
        f"{_FIGURE}. The signal of a model's first steps is larger than later on: to see that, "
        "let the function load a checkpoint. With --lr it suggests a learning rate instead: the "
        "training is begun again, with the same random numbers, at four or five rates, each "
        f"scored on batches that it has not seen; draws {_LR_FIGURE}. One process.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    size, steps = at_least(1), at_least(SHORTEST_PROBE)
    add("--config", type=Path, metavar="CONFIG.yaml", help="probe what `poprisk dpo` would run")
    add(
        "--steps",
        type=steps,
        default=30,
        metavar="N",
        help="optimizer steps to look at (default: %(default)s)",
    )
    for name, text in (
        ("batch-size", "examples per optimizer step, all accumulation counted"),
        ("dataset-size", "training examples"),
        ("total-steps", "optimizer steps of the whole training"),
    ):
        add(f"--{name}", type=size, metavar="N", help=text)
    add("--datamodule", metavar="MODULE:NAME", help="LightningDataModule class (or a function)")
    add("--init-args", type=_json_object, metavar="JSON", help="arguments of the LightningModule")
    add(
        "--trainer-args", type=_json_object, metavar="JSON", help="arguments of Lightning's Trainer"
    )
    add("--lr", action="store_true", help="suggest a learning rate")
    for name, kind, default, text in (
        ("steps", int, 100, "steps that train with each rate, fewer if an epoch is short"),
        ("score", int, 16, "steps' worth of batches after them that score it"),
        ("start", float, None, "first rate to try (default: 1e-3, or 3e-2 for SGD)"),
        ("factor", float, 4.0, "ratio of neighbouring rates"),
        ("candidates", int, 8, "most rates to try"),
    ):
        shown = f"with --lr: {text}" + ("" if default is None else " (default: %(default)s)")
        add(f"--lr-{name}", type=kind, default=default, metavar="N", help=shown)
    add(
        "--figure",
        type=Path,
        metavar="PNG",
        help=f"the picture to write (default: {_FIGURE}, or {_LR_FIGURE})",
    )
    add("--quiet", action="store_true", help="print nothing but errors")
    add("--json", action="store_true", help="print JSON, and nothing else, to stdout")
    # A positional argument could swallow the value of a config's key; a failing training shows
    # its own traceback.
    parser.set_defaults(run=run, rest=[], own_errors=False)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} must be a JSON object, {{...}}")
    return value


def run(args: argparse.Namespace) -> int:
    """Watch, measure, print and draw."""
    from rich.console import Console

    from poprisk_integrations.cli.probe.report import build_report
    from poprisk_integrations.cli.probe.show import (
        draw_probe,
        draw_rates,
        print_rates,
        print_report,
    )
    from poprisk_integrations.cli.probe.sources import RunSizes, find_target, watch_training
    from poprisk_integrations.cli.probe.watch import StepWatch

    target = find_target(args)
    figure = args.figure or Path(_LR_FIGURE if args.lr else _FIGURE)
    check_directory("--figure", figure)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("a probe is one process: run it without a launcher")
    try:
        if args.figure is not None:
            require("matplotlib", extra="demo")
        said = RunSizes(
            batch_size=args.batch_size, dataset_size=args.dataset_size, total_steps=args.total_steps
        )
        quiet = args.quiet or args.json
        report: Any
        if args.lr:
            from poprisk_integrations.cli.probe.rates import search_rate

            report = search_rate(args, target, said, None if quiet else progress_bar)
        else:
            with progress_bar(args.steps, "probing") as shown:
                watch = StepWatch(args.steps, None if quiet else shown.update)
                found = watch_training(args, target, watch)
            report = build_report(watch, said.or_else(found), target or str(args.config))
    except ImportError as error:
        if "pip install 'poprisk_integrations[" in str(error):
            raise UsageError(str(error)) from error
        raise
    draw = draw_rates if args.lr else draw_probe
    drawn = write_figure(figure, lambda: draw(report))
    if args.json:
        result = {**report.to_json(), "figure": str(figure) if drawn else None}
        print(json.dumps(result, indent=2, allow_nan=False))
    elif not args.quiet:
        console = Console(emoji=False)
        (print_rates if args.lr else print_report)(console, report)
        say(console, str(figure) if drawn else NO_MATPLOTLIB)
    return 0

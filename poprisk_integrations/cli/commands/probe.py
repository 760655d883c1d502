"""`poprisk probe`: a few steps of a training tell what a gate or a stop would do to it."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poprisk_integrations._imports import require
from poprisk_integrations.cli.errors import UsageError
from poprisk_integrations.cli.output import writing

if TYPE_CHECKING:
    from rich.console import Console

    from poprisk_integrations.cli.probe.report import ProbeReport
    from poprisk_integrations.cli.probe.sizes import RunSizes
    from poprisk_integrations.cli.probe.watch import StepWatch

__all__ = ["add_parser", "run"]

_FIGURE = "poprisk_probe.png"
_SHORTEST = 8
_ONLY_LIGHTNING = ("datamodule", "init_args", "trainer_args")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `probe` to the command line."""
    parser = subparsers.add_parser(
        "probe",
        help="a few steps of your training tell what a gate or a stop would do",
        usage="poprisk probe MODULE:NAME [OPTION ...]\n"
        "       poprisk probe --config CONFIG.yaml [OPTION ...] [--KEY VALUE ...]",
        description="Runs some steps of a training as it is, reads its gradients and ends it. "
        "MODULE:NAME (or FILE.py:NAME) is a LightningModule class, or a function without "
        "arguments that trains with any torch optimizer; CONFIG.yaml is one of `poprisk dpo`. "
        "Prints signal-to-noise ratios per layer, the noise scale, what each alpha of the gate "
        "would let pass, whether the stop can work, and two sentences of advice; draws "
        f"{_FIGURE}. The signal of a model's first steps is larger than later on: to see that, "
        "let the function load a checkpoint. One process.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", type=Path, metavar="CONFIG.yaml", help="probe what `poprisk dpo` would run")
    add("--steps", type=_steps, default=30, help="optimizer steps (default: %(default)s)")
    add("--batch-size", type=_size, help="examples per optimizer step over all accumulation")
    add("--dataset-size", type=_size, help="training examples")
    add("--total-steps", type=_size, help="optimizer steps of the whole training")
    add("--datamodule", metavar="MODULE:NAME", help="LightningDataModule class (or a function)")
    add("--init-args", type=_json_object, metavar="JSON", help="arguments of the LightningModule")
    add(
        "--trainer-args", type=_json_object, metavar="JSON", help="arguments of Lightning's Trainer"
    )
    add("--figure", type=Path, metavar="PNG", help=f"the picture to write (default: {_FIGURE})")
    add("--quiet", action="store_true", help="print nothing but errors")
    add("--json", action="store_true", help="print JSON, and nothing else, to stdout")
    # A positional argument could swallow the value of a recipe's key; a failing training shows
    # its own traceback.
    parser.set_defaults(run=run, rest=[], own_errors=False)


def run(args: argparse.Namespace) -> int:
    """Watch, measure, print and draw.

    Raises:
        UsageError: If the training cannot be found or probed, or an output not be written.
    """
    target = _target(args)
    figure = args.figure or Path(_FIGURE)
    if not figure.absolute().parent.is_dir():
        raise UsageError(f"Invalid --figure: {str(figure)!r}. Its directory does not exist.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("a probe is one process: run it without a launcher")
    try:
        if args.figure is not None:
            require("matplotlib", extra="demo")
        report = _probe(args, target)
    except ImportError as error:
        if "pip install 'poprisk_integrations[" in str(error):
            raise UsageError(str(error)) from error
        raise
    drawn = _draw(report, figure)
    if args.json:
        result = {**report.to_json(), "figure": str(figure) if drawn else None}
        print(json.dumps(result, indent=2, allow_nan=False))
    elif not args.quiet:
        from rich.console import Console

        from poprisk_integrations.cli.probe.table import print_report

        console = Console(emoji=False)
        print_report(console, report)
        line = str(figure) if drawn else (
            "No picture: matplotlib not found. Run: pip install 'poprisk_integrations[demo]'"
        )  # fmt: skip
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0


def _target(args: argparse.Namespace) -> str | None:
    """The MODULE:NAME among what argparse did not know; None where there is a recipe."""
    if args.config is not None:
        for name in _ONLY_LIGHTNING:
            if getattr(args, name) is not None:
                option = "--" + name.replace("_", "-")
                raise UsageError(f"{option} is for a LightningModule, not for a recipe")
        return None
    targets: list[str] = [part for part in args.rest if not part.startswith("-")]
    unknown = [part for part in args.rest if part.startswith("-")]
    if unknown:
        raise UsageError(f"unrecognized arguments: {' '.join(args.rest)}")
    if len(targets) != 1:
        raise UsageError("give one MODULE:NAME, or --config CONFIG.yaml (see `poprisk probe -h`)")
    return targets[0]


def _probe(args: argparse.Namespace, target: str | None) -> "ProbeReport":
    from rich.console import Console

    from poprisk_integrations.cli.probe.report import build_report
    from poprisk_integrations.cli.probe.sizes import RunSizes
    from poprisk_integrations.cli.probe.watch import StepWatch

    said = RunSizes(
        batch_size=args.batch_size,
        dataset_size=args.dataset_size,
        total_steps=args.total_steps,
    )
    console = Console(file=sys.stderr)
    with _progress(console, args.steps, quiet=args.quiet or args.json) as on_step:
        watch = StepWatch(args.steps, on_step)
        found = _run_source(args, target, watch)
    source = target or str(args.config)
    return build_report(watch, said.or_else(found), source)


def _run_source(args: argparse.Namespace, target: str | None, watch: "StepWatch") -> "RunSizes":
    from poprisk_integrations.cli.probe.lightning_source import (
        is_lightning_module,
        watch_lightning_module,
    )
    from poprisk_integrations.cli.probe.sizes import RunSizes
    from poprisk_integrations.cli.probe.target import load_target

    if target is None:
        from poprisk_integrations.cli.probe.recipe_source import watch_recipe

        return watch_recipe(args.config, args.rest, watch)
    found = load_target(target)
    try:
        if is_lightning_module(found):
            return watch_lightning_module(
                found,
                watch,
                datamodule=args.datamodule,
                init_args=args.init_args,
                trainer_args=args.trainer_args,
                total_steps=args.total_steps,
            )
        for name in _ONLY_LIGHTNING:
            if getattr(args, name) is not None:
                option = "--" + name.replace("_", "-")
                raise UsageError(f"{option} is for a LightningModule class")
        from poprisk_integrations.cli.probe.function_source import watch_function

        watch_function(found, target, watch)
    except ValueError as error:
        if "empty parameter list" in str(error):  # torch's words
            raise UsageError("the optimizer has no trainable parameter") from error
        raise
    return RunSizes()


@contextmanager
def _progress(
    console: "Console", steps: int, *, quiet: bool
) -> Iterator[Callable[[int], None] | None]:
    """A bar on a terminal, nothing elsewhere."""
    if quiet or not console.is_terminal:
        yield None
        return
    from rich.progress import Progress

    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("probing", total=steps)
        yield lambda step: bar.update(task, completed=step)


def _draw(report: "ProbeReport", path: Path) -> bool:
    """Draw and write; False where there is nothing to draw with."""
    if find_spec("matplotlib") is None:
        return False
    from poprisk_integrations.cli.probe.figure import draw_probe

    with writing(path) as temporary:
        draw_probe(report).savefig(temporary, format="png")
    return True


def _size(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer >= 1")
    return int(text)


def _steps(text: str) -> int:
    if not text.isdecimal() or int(text) < _SHORTEST:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer >= {_SHORTEST}")
    return int(text)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} must be a JSON object, {{...}}")
    return value

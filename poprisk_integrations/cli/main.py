"""Entry point of `poprisk`: parses, dispatches, turns errors into one line."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from poprisk_integrations import __version__
from poprisk_integrations.cli import check, clean, dpo, env, recipes, run
from poprisk_integrations.cli.demo import command as demo
from poprisk_integrations.cli.errors import UsageError, one_line
from poprisk_integrations.cli.flips import command as flips
from poprisk_integrations.cli.probe import command as probe
from poprisk_integrations.cli.report import command as report

__all__ = ["main"]

# What bad input looks like once it is past argparse. Anything else is our bug: traceback.
_BAD_INPUT = (UsageError, ValueError, ImportError, OSError)


_OVERVIEW = """\
poprisk: training on noisy data, without validation data

  poprisk check DATA             what is wrong with preferences, before training
  poprisk probe my_module:train  what gate and stop would do in your training
                                 (--lr: and which learning rate suits it)
  poprisk run script.py ...      your script, with optim="poprisk_adamw" known
  poprisk dpo --config C.yaml    DPO on preferences (`poprisk recipes`: configs)
  poprisk report RUN_DIR         did it help, why did it stop, what now: a page
  poprisk flips RUN_DIR          pairs whose label is probably wrong
  poprisk clean --config C.yaml  a better model in spite of them

`poprisk demo` shows it in minutes, offline. Options: `poprisk COMMAND --help`."""


class _Parser(argparse.ArgumentParser):
    """One line instead of the usage block; subparsers inherit it."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see `{self.prog} --help`)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line with these arguments, by default those of the process.

    Without any it says what one can do.

    Returns:
        Exit status: 0 for success, 2 for bad input, 130 after Ctrl-C, 141 where whoever reads the
        output has closed it. What else a command returns is passed on.
    """
    args = argparse.Namespace(command=None, debug=False, own_errors=True)
    try:
        if not (sys.argv[1:] if argv is None else argv):
            print(_OVERVIEW)
            return 0
        parser = _build_parser()
        found, rest = parser.parse_known_args(argv)
        if rest and not hasattr(found, "rest"):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        args = found
        args.rest = rest
        if args.command != "run" and hasattr(sys.stdout, "reconfigure"):
            # A terminal that knows no such letter shows "?": no reason to fail after the work.
            sys.stdout.reconfigure(errors="replace")
        status = int(args.run(args))
        sys.stdout.flush()  # now, where a closed pipe can still be told from a fault
        return status
    except BrokenPipeError:
        if args.debug or args.command == "run":  # a script's output is its own
            raise
        # Python flushes once more on exit, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        if args.debug:
            raise
        _complain("interrupted")
        return 130
    except _BAD_INPUT as error:
        if args.debug or not (args.own_errors or isinstance(error, UsageError)):
            raise
        _complain(one_line(error))
        return 2


def _complain(message: str) -> None:
    rank = os.environ.get("RANK", "0")  # set by launchers; each process reports for itself
    name = "poprisk" if rank == "0" else f"poprisk (rank {rank})"
    print(f"{name}: {message}", file=sys.stderr)


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="poprisk",
        description="Population-risk gated AdamW, stopping without validation data, and DPO on "
        "preferences with wrong labels.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"poprisk {__version__}")
    parser.add_argument(
        "--debug", action="store_true", help="show the traceback of an error (before the command)"
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in (check, probe, run, dpo, report, flips, clean, demo, recipes, env):
        command.add_parser(subparsers)
    parser.set_defaults(own_errors=True)  # False where they may be those of the user's own code
    return parser

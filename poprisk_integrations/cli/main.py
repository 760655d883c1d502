"""Entry point of `poprisk`: parses, dispatches, turns errors into one line."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from poprisk_integrations import __version__
from poprisk_integrations.cli.commands import demo, dpo, env, flips, probe, recipes, report, run
from poprisk_integrations.cli.errors import UsageError, one_line

__all__ = ["main"]

# What bad input looks like once it is past argparse. Anything else is our bug: traceback.
_BAD_INPUT = (UsageError, ValueError, ImportError, OSError)


class _Parser(argparse.ArgumentParser):
    """One line instead of the usage block; subparsers inherit it."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see `{self.prog} --help`)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        Exit status: 0 for success, 2 for bad input, 130 after Ctrl-C, 141 where whoever reads the
        output has closed it. What else a command returns is passed on.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = False
    own_errors = True
    is_script = False  # whose output and errors are its own
    try:
        parser = _build_parser()
        args, rest = parser.parse_known_args(argv)
        if rest and not hasattr(args, "rest"):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        args.rest = rest
        debug = args.debug
        own_errors = getattr(args, "own_errors", True)
        is_script = args.command == "run"
        if not is_script:
            _write_any_text(sys.stdout)
        status = int(args.run(args))
        sys.stdout.flush()  # now, where a closed pipe can still be told from a fault
        return status
    except BrokenPipeError:
        if debug or is_script:
            raise
        # Python flushes once more on exit, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        if debug:
            raise
        _complain("interrupted")
        return 130
    except _BAD_INPUT as error:
        if debug or not (own_errors or isinstance(error, UsageError)):
            raise
        _complain(one_line(error))
        return 2


def _write_any_text(stream: Any) -> None:
    """A terminal that knows no such letter shows "?": no reason to fail after the work."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="replace")


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
    for command in (demo, probe, dpo, flips, run, report, recipes, env):
        command.add_parser(subparsers)
    return parser


if __name__ == "__main__":
    sys.exit(main())

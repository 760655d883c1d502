"""Probes a training that is a Python function."""

import inspect
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

from poprisk_integrations.cli.errors import UsageError
from poprisk_integrations.cli.probe.watch import StepWatch

__all__ = ["watch_function"]


def watch_function(function: Callable[[], Any], target: str, watch: StepWatch) -> None:
    """Call it under the watch; what it prints goes to stderr, and it sees no arguments.

    Args:
        function: The training.
        target: What the user called it.
        watch: Not yet active.

    Raises:
        UsageError: If it needs arguments, or exits with an error status.
    """
    if not callable(function):
        raise UsageError(f"{target!r} is neither a function nor a LightningModule class")
    if inspect.isclass(function):
        raise UsageError(f"{target!r} is a class, but no LightningModule")
    needed = _required_arguments(function)
    if needed:
        raise UsageError(f"{target!r} needs arguments ({', '.join(needed)}): give one without")
    argv, sys.argv = sys.argv, [target]
    try:
        with redirect_stdout(sys.stderr), watch:
            function()
    except SystemExit as error:
        if error.code not in (None, 0):
            raise UsageError(f"{target!r} exited with {error.code!r}") from error
    finally:
        sys.argv = argv


def _required_arguments(function: Callable[[], Any]) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # builtins without a signature
        return []
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in optional]

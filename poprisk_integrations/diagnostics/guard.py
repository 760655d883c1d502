"""A hook of ours that fails switches its callback off; it does not end somebody's training."""

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar

from poprisk_integrations.distributed import world_size

__all__ = ["Guarded", "guarded"]

logger = logging.getLogger("poprisk_integrations")
Hook = TypeVar("Hook", bound=Callable[..., Any])


class Guarded:
    """Base of callbacks whose hooks are marked with `guarded`."""

    switched_off: str | None = None  # why this callback does nothing any more, in one line

    def switch_off(self, where: str, error: Exception) -> None:
        """Do nothing from here on, and say so once: a hook has raised an error."""
        self.switched_off = f"{type(error).__name__} in {where}: {error}"
        logger.warning(
            "%s is switched off for the rest of this run, which goes on without it (%s). Please "
            "report this.",
            type(self).__name__,
            self.switched_off,
            exc_info=error,
        )


def guarded(hook: Hook) -> Hook:
    """Mark a hook that runs inside somebody's training, or while a checkpoint is written.

    Hooks that start a run stay unmarked: what cannot work is refused there, before any work. With
    several processes the error is raised as it is: the others would wait for this one in vain.
    """

    @functools.wraps(hook)
    def call(self: Guarded, *args: Any, **kwargs: Any) -> Any:
        if self.switched_off is not None:
            return None
        try:
            return hook(self, *args, **kwargs)
        except Exception as error:
            if world_size() > 1:
                raise
            self.switch_off(hook.__name__, error)
            return None

    return call  # type: ignore[return-value]

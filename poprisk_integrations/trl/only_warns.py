"""What only reports never ends a run, and never keeps a model from being saved."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from poprisk_integrations.distributed import world_size

__all__ = ["OnlyWarns"]

logger = logging.getLogger(__name__)


class OnlyWarns:
    """Makes blocks whose exceptions become a warning, one for each thing that can fail.

    Bad input is refused before the first step; what fails later (a full disk, a number that is not
    finite) is our business and not that of the training around it.

    Example:
        >>> only_warns = OnlyWarns()
        >>> with only_warns("the flip report could not be written", "the model is saved"):
        ...     raise OSError("no space left")
    """

    def __init__(self) -> None:
        self._known: set[str] = set()

    @contextmanager
    def __call__(
        self, failure: str, kept: str = "training goes on", *, together: bool = False
    ) -> Iterator[None]:
        """Log what the block raises as a warning, once for each `failure`.

        Args:
            failure: What it means if the block fails.
            kept: What is not affected.
            together: The block is something that all ranks do together. Among several processes
                its error is raised: the others would wait for this one in vain.
        """
        try:
            yield
        except Exception as error:
            if together and world_size() > 1:
                raise
            if failure not in self._known:
                self._known.add(failure)
                cause = " ".join(f"{type(error).__name__}: {error}".split())
                logger.warning("%s (%s); %s.", failure, cause, kept)

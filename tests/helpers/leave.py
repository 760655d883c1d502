"""Ending a process of several."""

import os
import sys
from typing import NoReturn


def leave(code: int | None = 0) -> NoReturn:
    """Exit at once, without the interpreter's end.

    gloo's threads outlive `destroy_process_group` while a device mesh refers to a group. One that
    still drops a tensor as the interpreter ends aborts the process (torch 2.13: "terminate called
    without an active exception", in one launch of thirty on a busy machine), after all that a test
    looks at was written.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)

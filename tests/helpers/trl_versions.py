"""Marks for what TRL itself does only from some version on."""

from typing import Any

import pytest
import trl
from packaging.version import Version

__all__ = ["needs_trl"]


def needs_trl(version: str, what: str) -> Any:
    """Skip below a version, with the reason."""
    old = Version(trl.__version__) < Version(version)
    return pytest.mark.skipif(old, reason=f"TRL {trl.__version__} has no {what}")

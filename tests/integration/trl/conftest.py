"""What all runs of this folder have in common."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """transformers 5.23 deprecates a name that TRL 1.16 still uses."""
    ignored = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(ignored)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """For tiny models a second thread only waits, and for long on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

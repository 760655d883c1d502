import pytest
from torch.utils.data import DataLoader, IterableDataset

from poprisk_integrations.huggingface.callbacks.window_length import (
    auto_window_steps,
    steps_per_epoch,
)


@pytest.mark.parametrize(
    ("max_steps", "epoch_steps", "window"),
    [
        (300, 100, 100),
        (200, 100, 100),
        (199, 100, 33),
        (100, 100, 33),
        (12, 4, 8),
        (20, 20, 8),
        (1000, None, 50),
        (100, None, 8),
    ],
)
def test_rule(max_steps, epoch_steps, window):
    assert auto_window_steps(max_steps, epoch_steps) == window


class _Stream(IterableDataset):
    def __iter__(self):
        return iter(range(10))


def test_steps_per_epoch_counts_as_trainer_does():
    assert steps_per_epoch(DataLoader(range(33), batch_size=4), 2) == 5
    assert steps_per_epoch(DataLoader(range(3), batch_size=4), 2) == 1
    assert steps_per_epoch(DataLoader(_Stream(), batch_size=4), 2) is None
    assert steps_per_epoch(None, 1) is None

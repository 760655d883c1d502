"""The rule of window="auto"."""

import pytest

from poprisk_integrations.lightning.callbacks.window_length import auto_window_steps, total_steps


@pytest.mark.parametrize(
    ("micro_batches", "accumulation", "total", "steps"),
    [
        (100, 1, 200, 100),  # two epochs
        (100, 1, None, 100),  # no limit
        (100, 1, 199, 33),  # under two
        (103, 4, 52, 25),  # 25 complete steps and a short one, twice
        (103, 4, 51, 8),  # under two: 25 // 3
        (10, 1, 100, 10),
        (5, 1, 100, 8),  # never fewer than 8
        (5, 20, 100, 8),  # one step per epoch
        (None, 1, 1000, 50),
        (None, 4, 100, 8),
    ],
)
def test_auto_window_steps(micro_batches, accumulation, total, steps):
    assert auto_window_steps(micro_batches, accumulation, total) == steps


def test_nothing_known_is_an_error():
    with pytest.raises(ValueError, match="Invalid window: 'auto'. The data has no length"):
        auto_window_steps(None, 1, None)


@pytest.mark.parametrize(
    ("micro_batches", "accumulation", "max_epochs", "max_steps", "total"),
    [
        (100, 1, 3, -1, 300),
        (100, 3, 2, -1, 68),  # 33 complete and a short one, twice
        (100, 1, 3, 120, 120),
        (100, 1, -1, -1, None),
        (None, 1, 3, -1, None),
        (None, 1, None, 50, 50),
        (100, 1, 0, -1, 0),
    ],
)
def test_total_steps(micro_batches, accumulation, max_epochs, max_steps, total):
    assert total_steps(micro_batches, accumulation, max_epochs, max_steps) == total

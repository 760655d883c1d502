"""Lengths of runs, from what a trainer knows."""

from types import SimpleNamespace

import pytest

from poprisk_integrations.lightning.callbacks.run_length import total_steps, window_steps


@pytest.mark.parametrize(
    ("epoch_steps", "max_epochs", "max_steps", "total"),
    [
        (100, 3, -1, 300),
        (100, 3, 120, 120),
        (100, 3, 400, 300),
        (100, -1, -1, None),
        (100, None, -1, None),
        (None, 3, -1, None),
        (None, None, 50, 50),
        (100, 0, -1, 0),
    ],
)
def test_total_steps(epoch_steps, max_epochs, max_steps, total):
    assert total_steps(epoch_steps, max_epochs, max_steps) == total


def known(batches, accumulation=1, max_epochs=-1, max_steps=-1):
    return SimpleNamespace(
        num_training_batches=batches,
        accumulate_grad_batches=accumulation,
        max_epochs=max_epochs,
        max_steps=max_steps,
    )


@pytest.mark.parametrize(
    ("trainer", "window", "expected"),
    [
        (known(100, max_epochs=8), "auto", (100, 800)),
        (known(100, max_epochs=7), "auto", (33, 700)),
        (known(100), "auto", (100, None)),
        (known(103, 4, max_epochs=8), "auto", (25, 200)),  # the short 26th is left out
        (known(5, 20, max_epochs=100), "auto", (8, 100)),  # one step per epoch
        (known(float("inf"), max_steps=1000), "auto", (50, 1000)),
        (known(float("inf")), 12, (12, None)),
        (known(100, max_epochs=2), 12, (12, 200)),
    ],
)
def test_window_steps(trainer, window, expected):
    assert window_steps(trainer, window) == expected


def test_nothing_known_is_an_error():
    with pytest.raises(ValueError, match=r"Invalid window: 'auto'. The data has no length"):
        window_steps(known(float("inf")), "auto")

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
        (known(100, max_epochs=8), "auto", 100),
        (known(100, max_epochs=7), "auto", 33),
        (known(100), "auto", 100),
        (known(103, 4, max_epochs=8), "auto", 25),  # the short 26th is left out
        (known(5, 20, max_epochs=100), "auto", 8),  # one step per epoch
        (known(float("inf"), max_steps=1000), "auto", 50),
        (known(float("inf")), 12, 12),
        (known(100, max_epochs=2), 12, 12),
    ],
)
def test_window_steps(trainer, window, expected):
    assert window_steps(trainer, window) == expected


def test_nothing_known_is_an_error():
    with pytest.raises(ValueError, match=r"Invalid window: 'auto'. The data has no length"):
        window_steps(known(float("inf")), "auto")


@pytest.mark.parametrize(("must_stop", "max_epochs"), [(True, 2), (False, 1)])
@pytest.mark.filterwarnings("error")
def test_a_run_of_two_windows_is_long_enough(must_stop, max_epochs):
    assert window_steps(known(12, max_epochs=max_epochs), 12, must_stop=must_stop) == 12


def test_a_run_too_short_to_stop_says_so():
    with pytest.warns(UserWarning, match="12 steps, fewer than two windows of 12"):
        window_steps(known(12, max_epochs=1), 12, must_stop=True)

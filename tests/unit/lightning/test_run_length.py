"""Lengths of runs, from what a trainer knows."""

from types import SimpleNamespace

import pytest

from poprisk_integrations.lightning.callbacks.run_length import (
    loader_batch_size,
    steps_per_epoch,
    total_steps,
    why_no_stop,
    window_steps,
)


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
    ("trainer", "expected"),
    [
        (known(100), 100),
        (known(103, 4), 26),  # the last one is short
        (known(5, 20), 1),
        (known(float("inf")), None),
    ],
)
def test_steps_per_epoch(trainer, expected):
    assert steps_per_epoch(trainer) == expected


@pytest.mark.parametrize(
    ("trainer", "window", "pass_steps", "expected"),
    [
        (known(100, max_epochs=8), "auto", 100, 100),
        (known(100, max_epochs=7), "auto", 100, 33),
        (known(100), "auto", 100, 100),
        (known(5, 20, max_epochs=100), "auto", 1, 8),  # one step per epoch
        (known(float("inf"), max_steps=1000), "auto", None, 50),
        (known(float("inf"), max_steps=1000), "auto", 30, 30),  # the user's own count
        (known(float("inf")), 12, None, 12),
        (known(100, max_epochs=2), 12, 100, 12),
    ],
)
def test_window_steps(trainer, window, pass_steps, expected):
    assert window_steps(trainer, window, pass_steps) == expected


def test_nothing_known_is_an_error():
    with pytest.raises(ValueError, match=r"Invalid window: 'auto'. The data has no length"):
        window_steps(known(float("inf")), "auto", None)


@pytest.mark.parametrize(
    ("total", "window", "pass_steps", "min_steps", "message"),
    [
        (None, 12, 12, 10**6, None),
        (24, 12, 12, 0, None),  # a window of the first pass and one of the second
        (24, 12, None, 24, None),
        (23, 12, 12, 0, "of 12 steps on data seen before would end at step 24, the run at 23"),
        (99, 8, 100, 0, "one pass over the data"),
        (100, 8, 100, 0, "one pass over the data"),
        (105, 8, 100, 0, "would end at step 112"),  # it starts at 104
        (24, 12, 12, 25, "min_steps=25 is beyond the run's 24 steps"),
    ],
)
def test_why_a_run_cannot_stop(total, window, pass_steps, min_steps, message):
    trainer = known(float("inf"), max_steps=-1 if total is None else total)
    reason = why_no_stop(trainer, window, pass_steps, min_steps)
    assert (reason is None) if message is None else (message in reason)


@pytest.mark.parametrize(
    ("loader", "size"),
    [
        (SimpleNamespace(batch_size=4), 4),
        (SimpleNamespace(batch_size=None, batch_sampler=SimpleNamespace(batch_size=6)), 6),
        (SimpleNamespace(), None),
        (None, None),
    ],
)
def test_loader_batch_size(loader, size):
    assert loader_batch_size(SimpleNamespace(train_dataloader=loader)) == size

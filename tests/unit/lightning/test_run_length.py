"""Lengths of runs, from what a trainer knows."""

from types import SimpleNamespace

import pytest

from poprisk_integrations.lightning.callbacks.run_length import (
    loader_batch_size,
    pass_steps,
    steps_per_epoch,
    total_steps,
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
        (known(100), "auto", None, 100),  # a pass is unknown, an epoch is not
    ],
)
def test_window_steps(trainer, window, pass_steps, expected):
    assert window_steps(trainer, window, pass_steps) == expected


def test_a_stream_in_a_run_without_end_is_watched_all_the_same():
    assert window_steps(known(float("inf")), "auto", None) == 50


@pytest.mark.parametrize(
    ("pass_batches", "epoch_batches", "accumulation", "expected"),
    [
        (100, 100, 1, 100),
        (103, 103, 4, 26),  # the last one is short
        (1250, 20, 1, 1250),  # epochs are cut short
        (100, 20, 8, 15),  # and each ends with a short step
        (100, 300, 8, 13),  # three passes an epoch
        (110, 20, 8, 17),
        (100, float("inf"), 8, 13),
        (None, 100, 8, None),
    ],
)
def test_pass_steps(pass_batches, epoch_batches, accumulation, expected):
    assert pass_steps(pass_batches, epoch_batches, accumulation) == expected


@pytest.mark.parametrize(
    ("loader", "size"),
    [
        (SimpleNamespace(batch_size=4), 4),
        # Someone schedules the batch size: a loader's own attribute cannot change.
        (SimpleNamespace(batch_size=4, batch_sampler=SimpleNamespace(batch_size=8)), 8),
        (SimpleNamespace(batch_size=None, batch_sampler=SimpleNamespace(batch_size=6)), 6),
        (SimpleNamespace(), None),
        (None, None),
    ],
)
def test_loader_batch_size(loader, size):
    assert loader_batch_size(SimpleNamespace(train_dataloader=loader)) == size

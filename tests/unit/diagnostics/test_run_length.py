"""Lengths of runs, passes and windows, from plain numbers and from a Lightning Trainer."""

from types import SimpleNamespace

import pytest
from torch.utils.data import DataLoader, IterableDataset

from poprisk_integrations.diagnostics import auto_window_steps
from poprisk_integrations.diagnostics.data_pass import DataPass, batch_count, data_pass
from poprisk_integrations.diagnostics.run_length import (
    RunPlan,
    agree_on,
    epoch_steps,
    pass_steps,
    total_steps,
)
from poprisk_integrations.lightning._upstream import loader_batch_size, run_steps
from tests.helpers.gloo import spawn_gloo


@pytest.mark.parametrize(
    ("max_steps", "epoch_steps", "window"),
    [
        (3000, 100, 100),
        (800, 100, 100),
        (799, 100, 33),
        (100, 100, 33),
        (120, 4, 8),
        (20, 20, 8),
        (1000, None, 50),
        (100, None, 8),
        (None, 100, 100),
        (None, None, 8),
    ],
)
def test_auto_window(max_steps, epoch_steps, window):
    assert auto_window_steps(max_steps, epoch_steps) == window


@pytest.mark.parametrize("epoch_steps", [24, 40, 100])
@pytest.mark.parametrize("epochs", [2, 3, 5, 8, 20])
def test_two_windows_and_as_much_again_fit_into_the_run(epoch_steps, epochs):
    """The earliest stop at a constant learning rate: two windows to the onset, twice that."""
    total = epochs * epoch_steps
    assert 4 * auto_window_steps(total, epoch_steps) <= total


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
        (100, None, 8, 13),
        (None, 100, 8, None),
    ],
)
def test_pass_steps(pass_batches, epoch_batches, accumulation, expected):
    assert pass_steps(pass_batches, epoch_batches, accumulation) == expected


def _window(window="auto", batches=None, epoch=None, run=None, accumulation=1, asked=None):
    plan = RunPlan.of(
        DataPass(batches=batches),
        window=window,
        asked=asked,
        run_steps=run,
        epoch_batches=epoch,
        accumulation=accumulation,
        batch_size=None,
    )
    return plan.window, plan.epoch_steps


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"batches": 100, "epoch": 100, "run": 800}, (100, 100)),
        ({"batches": 100, "epoch": 100, "run": 700}, (33, 100)),
        ({"batches": 100, "epoch": 100, "run": 800, "window": "third"}, (33, 100)),
        ({"batches": 100, "epoch": 100}, (100, 100)),
        ({"batches": 5, "epoch": 5, "accumulation": 20, "run": 100}, (8, 1)),
        ({"run": 1000}, (50, None)),
        ({"run": 1000, "asked": 30}, (30, 30)),  # the user's own count
        ({"window": 12}, (12, None)),
        ({"epoch": 100}, (100, None)),  # a pass is unknown, an epoch is not
        ({}, (50, None)),  # a stream in a run without end is watched all the same
    ],
)
def test_plan(options, expected):
    assert _window(**options) == expected


class _Stream(IterableDataset):
    def __iter__(self):
        return iter(range(10))


def test_steps_per_epoch_as_a_trainer_counts_them():
    for data, steps in ((range(33), 5), (range(3), 1), (_Stream(), None)):
        assert epoch_steps(batch_count(DataLoader(data, batch_size=4)), 2) == steps
    assert epoch_steps(float("inf"), 2) is None
    trainer = SimpleNamespace(num_training_batches=103, accumulate_grad_batches=4, max_epochs=2)
    assert run_steps(SimpleNamespace(**vars(trainer), max_steps=-1)) == 52


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


def _agreed(rank, world_size):
    loaders = [
        DataLoader(range(40 + 8 * rank), batch_size=4, shuffle=True),
        DataLoader(range(40), batch_size=4, shuffle=True) if rank else DataLoader(_Stream()),
    ]
    found = [agree_on(data_pass(loader), (rank, None), "cpu") for loader in loaders]
    return [(data.batches, bool(data.reason), lengths) for data, lengths in found]


@pytest.mark.distributed
def test_the_longest_pass_of_all_ranks_counts():
    """Loaders may differ by rank: all plan the same windows, so that none waits for another."""
    first, second = spawn_gloo(2, _agreed)
    assert first == second == [(12, False, [1, None]), (None, True, [1, None])]

"""Loaders that differ by rank: all plan the same windows, so that none waits for another."""

import pytest
from torch.utils.data import DataLoader, IterableDataset

from poprisk_integrations.huggingface.callbacks.pass_count import PassCount
from tests.helpers.gloo import spawn_gloo

pytestmark = pytest.mark.distributed


class _Stream(IterableDataset):
    def __iter__(self):
        return iter(range(8))


def _plans(rank, world_size):
    loaders = [
        DataLoader(range(40 + 8 * rank), batch_size=4, shuffle=True),
        DataLoader(range(40), batch_size=4, shuffle=True) if rank else DataLoader(_Stream()),
    ]
    passes = [PassCount(loader, None, "cpu") for loader in loaders]
    return [(p.found.batches, bool(p.found.reason), p.is_over(20, 10)) for p in passes] + [
        passes[0].plan("third", 1000, 1).window
    ]


def test_the_longest_pass_of_all_ranks_counts():
    first, second = spawn_gloo(2, _plans)
    assert first == second == [(12, False, False), (None, True, False), 8]

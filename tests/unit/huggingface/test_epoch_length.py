from torch.utils.data import DataLoader, IterableDataset

from poprisk_integrations.huggingface.callbacks.epoch_length import steps_per_epoch


class _Stream(IterableDataset):
    def __iter__(self):
        return iter(range(10))


def test_steps_per_epoch_counts_as_trainer_does():
    assert steps_per_epoch(DataLoader(range(33), batch_size=4), 2) == 5
    assert steps_per_epoch(DataLoader(range(3), batch_size=4), 2) == 1
    assert steps_per_epoch(DataLoader(_Stream(), batch_size=4), 2) is None
    assert steps_per_epoch(None, 1) is None

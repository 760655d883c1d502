"""One pass over a loader's data, for every kind of loader and sampler, cut short or not."""

import itertools

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from poprisk_integrations.diagnostics.data_pass import data_pass, joint_data_pass

ROWS, BATCH = list(range(1000)), 10


def loader(**kwargs):
    return DataLoader(ROWS, **{"batch_size": BATCH, **kwargs})


def weighted(draws):
    return WeightedRandomSampler([1.0] * 1000, draws)


def of_batch_sampler(sampler, batch_size=BATCH):
    return DataLoader(ROWS, batch_sampler=BatchSampler(sampler, batch_size, drop_last=False))


def distributed(shuffle):
    return DistributedSampler(ROWS, num_replicas=4, rank=1, shuffle=shuffle)


def batches_until_all_came(loader):
    """By drawing."""
    missing = set(ROWS)
    for drawn, batch in enumerate(loader, start=1):
        missing -= set(batch.tolist())
        if not missing:
            return drawn
    raise AssertionError("they never did")


# name: loader, batches of a pass where it is not cut, the same where epochs are cut to 20 batches
KNOWN = {
    "in order": (loader(), 100, 20),
    "shuffled": (loader(shuffle=True), 100, 100),
    "shuffled, short last batch": (loader(shuffle=True, batch_size=30), 34, 34),
    "shuffled, last batch dropped": (loader(shuffle=True, batch_size=30, drop_last=True), 33, 33),
    "one by one": (DataLoader(ROWS, batch_size=None), 1000, 20),
    "few draws": (loader(sampler=RandomSampler(ROWS, num_samples=100)), 100, 100),
    "few draws, uneven": (loader(sampler=RandomSampler(ROWS, num_samples=95)), 106, 106),
    "many draws": (loader(sampler=RandomSampler(ROWS, num_samples=3000)), 100, 100),
    "with replacement": (loader(sampler=RandomSampler(ROWS, replacement=True)), 100, 100),
    "weighted": (loader(sampler=weighted(1000)), 100, 100),
    "weighted, few draws": (loader(sampler=weighted(200)), 100, 100),
    "weighted, many draws": (loader(sampler=weighted(4000)), 100, 100),
    "a random subset": (loader(sampler=SubsetRandomSampler(range(300))), 30, 30),
    "a subset": (DataLoader(Subset(ROWS, range(300)), batch_size=BATCH, shuffle=True), 30, 30),
    "a list as sampler": (loader(sampler=list(range(500))), 50, 20),
    "a range as sampler": (loader(sampler=range(500)), 50, 20),
    "a batch sampler": (of_batch_sampler(RandomSampler(ROWS)), 100, 100),
    "a batch sampler in order": (of_batch_sampler(SequentialSampler(ROWS)), 100, 20),
    "a list of batches as sampler": (DataLoader(ROWS, batch_sampler=[[0, 1], [2, 3]] * 30), 60, 20),
    "a rank's share, shuffled": (loader(sampler=distributed(True)), 25, 25),
    "a rank's share, in order": (loader(sampler=distributed(False)), 25, 20),
    "a list of batches": ([torch.zeros(2)] * 70, 70, 20),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known(name):
    given, whole, cut = KNOWN[name]
    assert data_pass(given).batches == data_pass(given, limit=5000).batches == whole
    assert data_pass(given, limit=20).batches == cut
    assert data_pass(given).reason == ""


@pytest.mark.parametrize("name", ["in order", "shuffled", "a batch sampler"])
def test_agrees_with_what_is_drawn(name):
    given, whole, _ = KNOWN[name]
    assert batches_until_all_came(given) == whole


class Stream(IterableDataset):
    def __init__(self, length=None):
        if length is not None:
            self.length = length

    def __iter__(self):
        yield from ROWS


class StreamWithLength(Stream):
    def __len__(self):
        return 1000


class OwnSampler(Sampler):
    def __iter__(self):
        yield from reversed(ROWS)

    def __len__(self):
        return len(ROWS)


class OwnRandomSampler(RandomSampler):
    def __iter__(self):
        yield from itertools.chain(super().__iter__(), super().__iter__())


class OwnDistributedSampler(DistributedSampler):
    def __iter__(self):
        return iter(ROWS[:7])


class OwnBatchSampler(BatchSampler):
    def __iter__(self):
        yield [0, 1]


class Endless(DataLoader):
    def __iter__(self):
        while True:
            yield from super().__iter__()


class WithoutLength(Sampler):
    def __iter__(self):
        yield from ROWS


UNKNOWN = {
    "a stream": (DataLoader(Stream(), batch_size=BATCH), "the data are a stream"),
    "a stream with a length": (DataLoader(StreamWithLength(), batch_size=BATCH), "a stream"),
    "an own sampler": (loader(sampler=OwnSampler()), "the sampler is a OwnSampler"),
    "an own random sampler": (loader(sampler=OwnRandomSampler(ROWS)), "is a OwnRandomSampler"),
    "an own rank's share": (
        loader(sampler=OwnDistributedSampler(ROWS, num_replicas=4, rank=1)),
        "the sampler is a OwnDistributedSampler",
    ),
    "an own batch sampler": (
        DataLoader(ROWS, batch_sampler=OwnBatchSampler(RandomSampler(ROWS), BATCH, False)),
        "the sampler is a OwnBatchSampler",
    ),
    "an own loader": (Endless(ROWS, shuffle=True), "the loader is a Endless with its own order"),
    "no length": (loader(sampler=WithoutLength()), "the loader has no length"),
    "no loader": ((i for i in ROWS), "the loader is a generator"),
}


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.parametrize("limit", [None, 20])
def test_unknown(name, limit):
    given, reason = UNKNOWN[name]
    found = data_pass(given, limit)
    assert found.batches is None
    assert reason in found.reason


def test_a_subclass_that_draws_as_its_parent_is_known():
    class Named(RandomSampler):
        """Adds nothing about the order."""

    assert data_pass(loader(sampler=Named(ROWS)), limit=20).batches == 100


def test_a_loader_of_torchdata_is_known_by_its_name(monkeypatch):
    """torchdata need not be installed."""

    class StatefulDataLoader(DataLoader):
        __module__ = "torchdata.stateful_dataloader.stateful_dataloader"

        def __iter__(self):
            return super().__iter__()

    assert data_pass(StatefulDataLoader(ROWS, BATCH, shuffle=True), limit=20).batches == 100


def test_what_accelerate_prepares():
    accelerate = pytest.importorskip("accelerate")
    prepared = accelerate.data_loader.prepare_data_loader
    for shuffle, cut in ((True, 100), (False, 20)):
        seeded = prepared(loader(shuffle=shuffle), use_seedable_sampler=True)
        assert (data_pass(seeded).batches, data_pass(seeded, 20).batches) == (100, cut)
        shard = prepared(loader(shuffle=shuffle), num_processes=4, process_index=1)
        assert (data_pass(shard).batches, data_pass(shard, 20).batches) == (25, min(25, cut))
    skipping = accelerate.data_loader.skip_first_batches(loader(shuffle=True), 30)
    assert data_pass(skipping).batches == 100  # the rest of an epoch that is resumed
    stream = prepared(DataLoader(Stream(), batch_size=BATCH))
    assert data_pass(stream).batches is None


@pytest.mark.parametrize("shuffle", [True, False])
def test_what_lightning_puts_around_a_sampler(shuffle):
    distributed = pytest.importorskip("lightning.fabric.utilities.distributed")

    def wrapped(sampler):
        return distributed.DistributedSamplerWrapper(
            sampler, num_replicas=4, rank=1, shuffle=shuffle
        )

    drawn = loader(sampler=wrapped(weighted(200)))  # 5 batches a rank for 200 draws of 1000
    assert data_pass(drawn, 3).batches == 25
    listed = loader(sampler=wrapped(ROWS))
    assert data_pass(listed, 20).batches == (25 if shuffle else 20)
    assert data_pass(loader(sampler=wrapped(OwnSampler()))).batches is None


def test_transformers_own_samplers():
    utils = pytest.importorskip("transformers.trainer_pt_utils")
    grouped = utils.LengthGroupedSampler(BATCH, lengths=ROWS)
    assert data_pass(loader(sampler=grouped), 20).batches == 100


@pytest.mark.parametrize(
    ("loaders", "steps", "batches"),
    [
        (["shuffled"], 100, 100),
        (["shuffled"], None, 100),
        (["shuffled", "a random subset"], 100, 100),  # the short one is cycled
        (["shuffled", "a random subset"], 30, 100),  # min_size, or limit_train_batches
        (["in order", "a random subset"], 30, 30),
        (["in order", "a list as sampler"], 20, 20),
        (["few draws", "weighted"], 10, 100),
    ],
)
def test_several_loaders(loaders, steps, batches):
    assert joint_data_pass([KNOWN[name][0] for name in loaders], steps).batches == batches


def test_one_unknown_of_several_makes_all_unknown():
    found = joint_data_pass([KNOWN["shuffled"][0], UNKNOWN["a stream"][0]], 100)
    assert found.batches is None
    assert "stream" in found.reason
    assert joint_data_pass([], None).batches is None

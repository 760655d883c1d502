"""Sitters leave the batches of every kind of loader, and come back in batches of their own."""

import itertools
import random

import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import (
    BatchSamplerShard,
    DataLoaderDispatcher,
    DataLoaderShard,
    SeedableRandomSampler,
    prepare_data_loader,
)
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

from poprisk_integrations.diagnostics.data_pass import data_pass, sit_out_refusal
from poprisk_integrations.diagnostics.sit_out_loader import SitOutLoader

N, BATCH, SHARE = 103, 8, 0.2
ROWS = torch.arange(N)
# As the worker process of a loader collates them.
pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)


class Experiment:
    """Stands in for `SittingOut`: who sits in an epoch, from a seed."""

    seed, device = 0, torch.device("cpu")

    def __init__(self, examples=N, share=SHARE):
        self.examples, self.share, self.epoch = examples, share, 0

    def sits(self):
        generator = torch.Generator().manual_seed(self.epoch)
        order = torch.randperm(self.examples, generator=generator)
        sits = torch.zeros(self.examples, dtype=torch.bool)
        sits[order[: round(self.share * self.examples)]] = True
        return sits


class BySize(Sampler):
    """A user's own batch sampler: shuffled, with lists of sizes that vary."""

    def __iter__(self):
        order = torch.randperm(N).tolist()
        while order:
            size = 1 + len(order) % 7
            yield order[:size]
            order = order[size:]

    def __len__(self):
        count = left = 0
        left = N
        while left > 0:
            left -= 1 + left % 7
            count += 1
        return count


def loader(**options):
    return DataLoader(ROWS, **{"batch_size": BATCH, **options})


def shard(rank, world_size, *, sampler=None):
    sampler = RandomSampler(ROWS, generator=torch.Generator()) if sampler is None else sampler
    inner = BatchSampler(sampler, BATCH, drop_last=False)
    return DataLoaderShard(
        ROWS, batch_sampler=BatchSamplerShard(inner, world_size, rank), num_workers=0
    )


def length_grouped():
    return LengthGroupedSampler(BATCH, lengths=[1 + i % 17 for i in range(N)])


LOADERS = {
    "in order": lambda: loader(),
    "shuffled": lambda: loader(shuffle=True),
    "last batch dropped": lambda: loader(shuffle=True, drop_last=True),
    "seedable": lambda: loader(sampler=SeedableRandomSampler(ROWS, data_seed=3)),
    "distributed": lambda: loader(sampler=DistributedSampler(ROWS, 2, 1)),
    "accelerate": lambda: prepare_data_loader(loader(shuffle=True), num_processes=1),
    "accelerate's shard": lambda: shard(1, 2),
    "length grouped": lambda: loader(sampler=length_grouped()),
    "a subset": lambda: loader(sampler=SubsetRandomSampler(range(0, N, 2))),
    "batch of one": lambda: loader(batch_size=1, shuffle=True),
    "batch of two": lambda: loader(batch_size=2, shuffle=True),
    "one batch": lambda: loader(batch_size=N, shuffle=True),
    "lists": lambda: DataLoader(ROWS, batch_sampler=[[0, 5], [3, 4], [9]]),
    "sizes that vary": lambda: DataLoader(ROWS, batch_sampler=BySize()),
    "batches by the data set": lambda: DataLoader(
        ROWS, sampler=BatchSampler(RandomSampler(ROWS), BATCH, False), batch_size=None
    ),
}


def lists_of(given):
    torch.manual_seed(7)
    return [batch.tolist() for batch in given]


def run_pass(given, handle):
    """(batches of visitors, {number of the batch before which they came: groups of sitters})."""
    torch.manual_seed(7)
    visitors, sitters = [], {}
    for number, batch in enumerate(given):
        due = [handle.sitters(group) for group in handle.due(number)]
        assert all(len(batch) == rows for batch, _, rows in due)
        sitters[number] = [(batch.tolist(), indices.tolist()) for batch, indices, _ in due]
        assert handle.indices(number).tolist() == batch.tolist()
        visitors.append(batch.tolist())
    return visitors, sitters


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


@pytest.mark.parametrize("name", LOADERS)
def test_sitters_leave_and_all_else_stays(name):
    plain, experiment = lists_of(LOADERS[name]()), Experiment()
    given = LOADERS[name]()
    handle = SitOutLoader(given, experiment)
    visitors, sitters = run_pass(given, handle)
    sits = set(experiment.sits().nonzero().flatten().tolist())
    mine = [i for i in flat(plain) if i not in sits]
    assert len(visitors) == len(plain) == len(given) == handle.batches
    assert all(visitors)
    assert data_pass(given) == data_pass(LOADERS[name]())  # its length is still known
    if name == "in order":  # of 8 eight in ten stay, of the last 7 as well
        assert {len(batch) for batch in visitors} == {6, 7}
    if name == "sizes that vary":  # they are only made smaller
        for before, after in zip(plain, visitors, strict=True):
            assert set(after) <= set(before) or len(after) == 1
    elif len(mine) >= len(plain):
        assert flat(visitors) == mine  # the user's order
    first = list(dict.fromkeys(flat(visitors)))
    assert set(first) == set(mine)
    assert not sits & set(first)
    measured = flat(group for due in sitters.values() for _, group in due)
    assert measured == [i for i in flat(plain) if i in sits]
    for batch, indices in flat(sitters.values()):
        assert batch  # something to forward, always
        assert batch == indices or not indices
    assert not sits & set(flat(run_pass(given, handle)[0]))  # another pass, whatever its order


def test_batches_of_one_repeat_an_example_of_the_other_half():
    given = loader(batch_size=1)
    visitors, _ = run_pass(given, SitOutLoader(given, Experiment()))
    places = {}
    for number, (index,) in enumerate(visitors):
        places.setdefault(index, []).append(number)
    repeats = [found for found in places.values() if len(found) > 1]
    assert len(repeats) == round(SHARE * N)
    assert all(len(found) == 2 and found[1] - found[0] > N / 3 for found in repeats)


@pytest.mark.parametrize("batch", [1, 4, 8, 30, N])
def test_sitters_are_measured_when_visitors_are_on_average(batch):
    given = loader(batch_size=batch)
    handle = SitOutLoader(given, Experiment(share=0.3))
    _, sitters = run_pass(given, handle)
    places = flat([number] * len(i) for number, due in sitters.items() for _, i in due)
    middle = (len(given) - 1) / 2
    assert abs(sum(places) / len(places) - middle) <= 0.06 * len(given)
    groups = sum(len(due) for due in sitters.values())
    assert groups == max(min(4, len(given)), round(0.3 * len(given)))
    # In order of the data, each near the place where it would have been trained on.
    gaps = [abs(n - i // batch) for n, due in sitters.items() for _, i in due for i in i]
    assert max(gaps) <= max(1, len(given) / 4)


def test_a_rank_without_sitters_has_something_to_forward():
    """Forward passes of sharded models take all ranks."""
    experiment = Experiment()
    experiment.sits = lambda: torch.arange(N) < 3  # all in rank 0's first batch
    groups = []
    for rank in (0, 1):
        handle = SitOutLoader(given := shard(rank, 2, sampler=range(96)), experiment)
        groups.append(run_pass(given, handle)[1])
    first, second = ([len(due) for due in found.values()] for found in groups)
    assert first == second
    assert sum(first) == 4
    assert flat(i for due in groups[0].values() for _, i in due) == [0, 1, 2]
    assert all(batch and not i for due in groups[1].values() for batch, i in due)


def test_a_resumed_epoch_skips_its_first_batches():
    given, experiment = LOADERS["accelerate"](), Experiment()
    handle = SitOutLoader(given, experiment)
    torch.manual_seed(7)
    whole = [batch.tolist() for batch in given]
    rest = skip_first_batches(given, 5)
    torch.manual_seed(7)
    found = []
    for number, batch in enumerate(rest, start=5):
        assert handle.indices(number).tolist() == batch.tolist()
        found.append(batch.tolist())
    assert len(rest) == len(given) - 5
    assert sorted(flat(found)) == sorted(flat(whole[5:]))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_broken_off_and_workers_that_knew_the_old_batches(workers):
    options = {"persistent_workers": True, "prefetch_factor": 4} if workers else {}
    given = loader(shuffle=True, num_workers=workers, **options)
    assert len(flat(lists_of(given))) == N
    handle = SitOutLoader(given, experiment := Experiment())
    for _, _batch in zip(range(3), given, strict=False):
        pass
    experiment.epoch = 1
    visitors, sitters = run_pass(given, handle)
    sits = set(experiment.sits().nonzero().flatten().tolist())
    assert set(flat(visitors)) == set(range(N)) - sits
    assert set(flat(i for due in sitters.values() for _, i in due)) == sits
    handle.undo()
    assert sorted(flat(lists_of(given))) == list(range(N))


@pytest.mark.parametrize("name", LOADERS)
def test_with_nobody_sitting_batches_and_random_numbers_are_the_same(name):
    plain = LOADERS[name]()
    torch.manual_seed(7)
    before = [batch.tolist() for batch in plain], torch.rand(())
    given = LOADERS[name]()
    handle = SitOutLoader(given, Experiment(share=0.0))
    torch.manual_seed(7)
    after = []
    for number, batch in enumerate(given):
        assert not handle.due(number)
        after.append(batch.tolist())
    assert (after, torch.rand(())) == before


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_for_a_look_changes_no_pass(workers):
    """Also in the middle of one: loaders with workers draw their first batches in `iter`."""
    given = loader(num_workers=workers)
    handle = SitOutLoader(given, experiment := Experiment())
    measured = []
    for number, _batch in enumerate(given):
        batch, indices = handle.sample()
        assert batch.tolist() == indices.tolist() == list(range(BATCH))
        for group in handle.due(number):
            measured += handle.sitters(group)[1].tolist()
    assert measured == experiment.sits().nonzero().flatten().tolist()
    handle.undo()


def test_nothing_is_drawn_before_the_first_batch():
    """The epoch may begin after `iter`: who sits is asked when the first list is drawn."""
    given, experiment, asked = loader(), Experiment(), []
    SitOutLoader(given, experiment, lambda: asked.append(1))
    iterator = iter(given)
    assert not asked
    next(iterator)
    assert asked == [1]


def test_after_the_release_nobody_sits():
    given, experiment = loader(), Experiment()
    handle = SitOutLoader(given, experiment)
    visitors = []
    for number, batch in enumerate(given):
        if number == 6:
            handle.release()
        assert handle.indices(number).tolist() == batch.tolist()
        visitors.append(batch.tolist())
    sits = set(experiment.sits().nonzero().flatten().tolist())
    back = set(flat(visitors)) & sits
    # Of 103 in order, 7 batches of 8 had been drawn: who sat in the others is back.
    assert back == {i for i in sits if i >= 56}
    assert len(flat(visitors)) == len(set(flat(visitors)))
    assert set(flat(visitors)) == set(range(N)) - sits | back
    assert max(len(batch) for batch in visitors) <= BATCH + 1
    assert flat(run_pass(given, handle)[0]) == list(range(N))
    assert not any(run_pass(given, handle)[1].values())


def test_others_see_the_users_sampler_and_get_it_back():
    """Trainers reach through the batch sampler: epochs of distributed samplers, batch sizes."""
    given = loader(sampler=DistributedSampler(ROWS, 2, 0, seed=1), drop_last=True)
    before = given.batch_sampler
    SitOutLoader(given, Experiment())
    assert (given.batch_sampler.batch_size, given.batch_sampler.drop_last) == (BATCH, True)
    given.batch_sampler.sampler.set_epoch(4)
    assert given.sampler.epoch == 4
    assert not hasattr(given.batch_sampler, "set_epoch")
    assert isinstance(given.batch_sampler, BatchSampler)
    SitOutLoader(given, Experiment()).undo()  # of the first one, whose run failed, too
    assert given.batch_sampler is before


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(9))


class OwnOrder(DataLoader):
    def __iter__(self):
        return reversed(list(super().__iter__()))


class NoLength(Sampler):
    def __iter__(self):
        return iter(range(N))


class Twice(NoLength):
    """Each example of the first half, twice."""

    def __iter__(self):
        return iter(random.choices(range(N // 2), k=N))

    def __len__(self):
        return N


class Refers(Twice):
    """Fine, but for a lock that cannot be copied."""

    def __init__(self):
        self.lock = (i for i in range(3))


class Outside(Twice):
    def __iter__(self):
        return iter(range(1, N + 1))


REFUSED = {
    "the loader is a list": lambda: [ROWS],
    "the loader is a OwnOrder": lambda: OwnOrder(ROWS),
    "the data are a stream": lambda: DataLoader(Stream()),
    "makes no batches": lambda: loader(batch_size=None),
    "the data have no length": lambda: loader(sampler=NoLength()),
    "with replacement": lambda: loader(sampler=RandomSampler(ROWS, replacement=True)),
    "draws with": lambda: loader(sampler=WeightedRandomSampler([1.0] * N, N)),
    "any number of": lambda: shard(0, 2, sampler=WeightedRandomSampler([1.0] * N, N)),
    "an epoch draws 5 of the 13": lambda: loader(sampler=RandomSampler(ROWS, num_samples=40)),
    "an epoch draws 26 batches, and 13 would": lambda: loader(
        sampler=RandomSampler(ROWS, num_samples=2 * N)
    ),
    "draws examples more than once": lambda: loader(sampler=Twice()),
    "could not be looked at (TypeError": lambda: loader(sampler=Refers()),
    "draws no indices into the data set": lambda: loader(sampler=Outside()),
    "one process draws the batches": lambda: DataLoaderDispatcher(ROWS, batch_size=4),
    "fewer than two examples": lambda: DataLoader([0]),
}


@pytest.mark.parametrize("said", REFUSED)
def test_refused_with_a_reason(said):
    given = REFUSED[said]()
    torch.manual_seed(3)
    random.seed(3)
    before = torch.get_rng_state(), random.getstate()
    assert said in sit_out_refusal(given)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    with pytest.raises(ValueError, match="Invalid loader: "):
        SitOutLoader(given, Experiment())


@pytest.mark.parametrize(
    ("shuffle", "limit", "said"),
    [(True, 4, "an epoch draws 4 of the 13"), (False, 4, ""), (True, 400, "")],
)
def test_a_trainers_limit_hides_examples_unless_they_come_in_order(shuffle, limit, said):
    assert sit_out_refusal(loader(shuffle=shuffle), limit=limit).startswith(said)
    assert bool(sit_out_refusal(loader(shuffle=shuffle), limit=limit)) is bool(said)

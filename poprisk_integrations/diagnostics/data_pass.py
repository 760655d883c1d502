"""What a loader shows of its data: how long one pass over them is, which example is which."""

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from poprisk_integrations.diagnostics.without_traces import randomness_kept

__all__ = ["DataPass", "batch_count", "data_pass", "joint_data_pass", "sit_out_refusal"]

_WITH_ITS_PLACE = "torchdata.StatefulDataLoader"  # fast-forwards its sampler by itself
# Classes by the package and the class that define `__iter__`: a subclass with its own is unknown.
_LOADERS = {
    "torch.DataLoader",
    "accelerate.DataLoaderShard",
    "accelerate.DataLoaderDispatcher",
    "accelerate.SkipDataLoader",
    _WITH_ITS_PLACE,
}
_BATCH_SAMPLERS = {
    "torch.BatchSampler",
    "accelerate.BatchSamplerShard",
    "accelerate.SkipBatchSampler",
    "torchdata.BatchSampler",
    "poprisk_integrations.VisitorBatches",
}
_IN_ORDER = {"torch.SequentialSampler"}
_DISTRIBUTED = {
    "torch.DistributedSampler",
    "torchdata.StatefulDistributedSampler",
    "transformers.DistributedSamplerWithLoop",
    "lightning.UnrepeatedDistributedSampler",
    "pytorch_lightning.UnrepeatedDistributedSampler",
}
_DISTRIBUTED_WRAPPERS = {
    "lightning.DistributedSamplerWrapper",
    "lightning_fabric.DistributedSamplerWrapper",
}
_PERMUTED = {
    "torch.SubsetRandomSampler",
    "transformers.LengthGroupedSampler",
    "transformers.DistributedLengthGroupedSampler",
}
_DRAWN = {  # a permutation of all data, or any number of draws from them
    "torch.RandomSampler",
    "torchdata.RandomSampler",
    "accelerate.SeedableRandomSampler",
}
_WEIGHTED = {"torch.WeightedRandomSampler"}


@dataclass(frozen=True, kw_only=True, slots=True)
class DataPass:
    """One pass over the data of a loader, as far as the loader shows it."""

    # Of this process, until as many examples were drawn as there are; None if it cannot be known.
    batches: int | None
    reason: str = ""  # why it is not known


def data_pass(loader: Any, limit: int | None = None) -> DataPass:
    """Tell the length of a pass from the data set and the sampler, not from a trainer's epoch.

        known     torch's, accelerate's, Lightning's and transformers' own samplers over data
                  with a length. Samplers that draw more or fewer examples than there are
                  (`num_samples`, weights, replacement): as many batches as hold that many draws
        known     a list of batches, and an unshuffled loader cut short: the same batches again
        unknown   streams, samplers and loaders of other classes, where nothing says whether an
                  example comes again

    An example of a map-style data set counts as the same at its next visit, augmented or not.
    `limit` are the batches that a trainer takes per epoch; None for all.

    Example:
        >>> from torch.utils.data import RandomSampler
        >>> rows = list(range(1000))
        >>> data_pass(DataLoader(rows, batch_size=10, shuffle=True), limit=20).batches
        100
        >>> data_pass(DataLoader(rows, batch_size=10), limit=20).batches  # the same 20 again
        20
        >>> sampler = RandomSampler(rows, num_samples=100)
        >>> data_pass(DataLoader(rows, batch_size=10, sampler=sampler)).batches
        100
    """
    if isinstance(loader, (list, tuple)):
        return DataPass(batches=_cut(len(loader), limit))
    if not isinstance(getattr(loader, "base_dataloader", loader), DataLoader):
        return _unknown(f"the loader is a {type(loader).__name__}")
    if (name := _definer(loader)) not in _LOADERS:
        return _unknown(f"the loader is a {name.partition('.')[2]} with its own order")
    if isinstance(loader.dataset, IterableDataset):
        return _unknown("the data are a stream")
    sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    batches, depth = batch_count(loader), 0
    while _definer(sampler) in _BATCH_SAMPLERS and depth < 8:
        if batches is not None:  # the rest of an epoch that is resumed
            batches += getattr(sampler, "skip_batches", 0)
        depth += 1
        wrapped = getattr(sampler, "before_sitting_out", None)
        sampler = wrapped or getattr(sampler, "batch_sampler", None) or sampler.sampler
    return _of_sampler(sampler, batches, limit)


def joint_data_pass(loaders: Sequence[Any], steps: int | None = None) -> DataPass:
    """The same of several loaders that a trainer draws from together, a batch of each per step.

    A short one may be cycled meanwhile; a pass is over when the longest has been drawn once.
    """
    passes = [data_pass(one, steps) for one in loaders]
    unknown = [part for part in passes if part.batches is None]
    if unknown or not passes:
        return unknown[0] if unknown else _unknown("there is no loader")
    return max(passes, key=lambda part: part.batches or 0)


def sit_out_refusal(loader: Any, limit: int | None = None) -> str:
    """Why examples of this loader cannot sit out of an epoch; "" if they can.

    Needed are a data set with a length, and a sampler that draws each example once per epoch, but
    for the repeats that fill up a last batch. Samplers of unknown classes are copied and drawn from
    once, with all random numbers put back.

    `limit` is how many batches of it a trainer takes per epoch; None for all.
    """
    base = getattr(loader, "base_dataloader", loader)
    name = _definer(loader)
    if not isinstance(base, DataLoader) or name not in _LOADERS or name == _WITH_ITS_PLACE:
        return f"the loader is a {type(loader).__name__}, which shows no order of examples"
    if isinstance(base.dataset, IterableDataset):
        return "the data are a stream"
    if name == "accelerate.DataLoaderDispatcher":
        return "one process draws the batches for all (dispatch_batches)"
    sampler = base.sampler if base.batch_sampler is None else base.batch_sampler
    if base.batch_sampler is None and not isinstance(sampler, BatchSampler):
        return "the loader makes no batches (batch_size=None)"
    try:
        batches, examples = len(loader), len(base.dataset)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return "the data have no length"
    if batches < 1 or examples < 2:
        return "there are fewer than two examples"
    part: Any = sampler
    for _ in range(8):  # samplers inside each other
        if getattr(part, "replacement", False):
            return (
                "the sampler draws with replacement: an example comes any number of times per epoch"
            )
        part = getattr(part, "batch_sampler", None) or getattr(part, "sampler", None)
    found = data_pass(loader)
    if found.batches is None:
        return _look(sampler, base.dataset, examples)
    taken = batches if limit is None else min(batches, limit)
    if found.batches > taken and data_pass(loader, limit).batches != taken:
        return f"an epoch draws {taken} of the {found.batches} batches that would hold all examples"
    if found.batches < batches:
        return f"an epoch draws {batches} batches, and {found.batches} would hold all examples"
    return ""


def _look(sampler: Any, dataset: Any, examples: int) -> str:
    """The same from one pass of a copy."""
    name = type(sampler).__name__
    with randomness_kept():
        try:
            own = copy.deepcopy(sampler, {id(dataset): dataset})
            lists = [[int(i) for i in part] for part in itertools.islice(own, len(sampler))]
        except Exception as error:  # whatever somebody's sampler does
            return (
                f"the sampler, a {name}, could not be looked at ({type(error).__name__}: {error})"
            )
    drawn = list(itertools.chain.from_iterable(lists))
    if not drawn or not all(0 <= i < examples for i in drawn):
        return f"the sampler, a {name}, draws no indices into the data set"
    if len(drawn) - len(set(drawn)) > max(map(len, lists)):
        return f"the sampler, a {name}, draws examples more than once per epoch"
    return ""


def _of_sampler(sampler: Any, batches: int | None, limit: int | None) -> DataPass:
    name, is_shuffled = _definer(sampler), False
    if name in _DISTRIBUTED_WRAPPERS:  # ranks share what another sampler draws
        sampler, is_shuffled = getattr(sampler.dataset, "_sampler", None), sampler.shuffle
        name = _definer(sampler)
    if batches is None:
        return _unknown("the loader has no length")
    is_list = isinstance(sampler, (list, tuple, range))
    in_order = is_list or name in _IN_ORDER or (name in _DISTRIBUTED and not sampler.shuffle)
    if in_order and not is_shuffled:
        return DataPass(batches=_cut(batches, limit))
    if in_order or name in _DISTRIBUTED | _PERMUTED:
        return DataPass(batches=max(1, batches))
    if name in _DRAWN | _WEIGHTED:
        examples = len(sampler.weights if name in _WEIGHTED else sampler.data_source)
        return DataPass(batches=max(1, -(-batches * examples // max(1, len(sampler)))))
    return _unknown(f"the sampler is a {type(sampler).__name__}")


def _definer(thing: Any) -> str:
    """Package and name of the class whose `__iter__` this is, as "torch.DataLoader"."""
    for cls in type(thing).__mro__:
        if "__iter__" in vars(cls):
            return f"{cls.__module__.partition('.')[0]}.{cls.__name__}"
    return f".{type(thing).__name__}"


def batch_count(loader: Any) -> int | None:
    """Batches that a loader says it has, which need not be a pass; None without a length."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def _cut(batches: int, limit: int | None) -> int:
    return max(1, batches if limit is None else min(batches, limit))


def _unknown(why: str) -> DataPass:
    return DataPass(batches=None, reason=why)

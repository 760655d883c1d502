"""How many batches of a loader are one pass over its data, which an epoch may not be."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

__all__ = ["DataPass", "data_pass", "joint_data_pass"]

# Classes by the package and the class that define `__iter__`: a subclass with its own is unknown.
_LOADERS = {
    "torch.DataLoader",
    "accelerate.DataLoaderShard",
    "accelerate.DataLoaderDispatcher",
    "accelerate.SkipDataLoader",
    "torchdata.StatefulDataLoader",
}
_BATCH_SAMPLERS = {
    "torch.BatchSampler",
    "accelerate.BatchSamplerShard",
    "accelerate.SkipBatchSampler",
    "torchdata.BatchSampler",
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
    """One pass over the data of a loader, as far as the loader shows it.

    Attributes:
        batches: Batches of this process until as many examples were drawn as there are; None if
            that cannot be known.
        reason: Why it is not known; "" if it is.
    """

    batches: int | None
    reason: str = ""


def data_pass(loader: Any, limit: int | None = None) -> DataPass:
    """Tell the length of a pass from the data set and the sampler, not from a trainer's epoch.

        known     torch's, accelerate's, Lightning's and transformers' own samplers over data
                  with a length. Samplers that draw more or fewer examples than there are
                  (`num_samples`, weights, replacement): as many batches as hold that many draws
        known     a list of batches, and an unshuffled loader cut short: the same batches again
        unknown   streams, samplers and loaders of other classes, where nothing says whether an
                  example comes again

    An example of a map-style data set counts as the same at its next visit, augmented or not.

    Args:
        loader: Of one process.
        limit: Batches of it that a trainer takes per epoch; None for all.

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
    batches, depth = _length(loader), 0
    while _definer(sampler) in _BATCH_SAMPLERS and depth < 8:
        if batches is not None:  # the rest of an epoch that is resumed
            batches += getattr(sampler, "skip_batches", 0)
        sampler, depth = getattr(sampler, "batch_sampler", None) or sampler.sampler, depth + 1
    return _of_sampler(sampler, batches, limit)


def joint_data_pass(loaders: Sequence[Any], steps: int | None = None) -> DataPass:
    """The same of several loaders that a trainer draws from together, a batch of each per step.

    A short one may be cycled meanwhile; a pass is over when the longest has been drawn once.

    Args:
        loaders: Of one process.
        steps: Batches that a trainer takes per epoch; None for as many as there are.

    Example:
        >>> long, short = DataLoader(list(range(9)), shuffle=True), DataLoader(list(range(3)))
        >>> joint_data_pass([long, short], 3).batches  # nine steps until the long one is seen
        9
    """
    passes = [data_pass(one, steps) for one in loaders]
    unknown = [part for part in passes if part.batches is None]
    if unknown or not passes:
        return unknown[0] if unknown else _unknown("there is no loader")
    return max(passes, key=lambda part: part.batches or 0)


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
    """Package and name of the class whose `__iter__` this is."""
    for cls in type(thing).__mro__:
        if "__iter__" in vars(cls):
            return f"{cls.__module__.partition('.')[0]}.{cls.__name__}"
    return f".{type(thing).__name__}"


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def _cut(batches: int, limit: int | None) -> int:
    return max(1, batches if limit is None else min(batches, limit))


def _unknown(why: str) -> DataPass:
    return DataPass(batches=None, reason=why)

"""Takes sitters out of a loader's batches, and gives batches of them to be measured."""

import itertools
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader

from poprisk_integrations.diagnostics.data_pass import sit_out_refusal
from poprisk_integrations.distributed import world_size

if TYPE_CHECKING:
    from poprisk_integrations.diagnostics.sitting_out import SittingOut

__all__ = ["SitOutLoader", "VisitorBatches"]

_MEASURED_PER_EPOCH = 4  # batches of sitters at least: one for each quarter


class SitOutLoader:
    """Has the sitters of an experiment left out of a loader's batches, in place.

    It must be made before `iter(loader)`: batches are changed from the next pass on. Who sits is
    asked when the first batch of a pass is drawn, right after `on_pass` was called.

        number of batches    as before, and so are steps and schedules
        order                that of the user's sampler
        size                 B becomes about (1 - p) B. Where examples are wanting (batches of one)
                             some of the other half of the epoch come a second time
        varying sizes        (token budgets) are only made smaller

    With several processes each leaves the sitters out of its own batches, after sharding. Batches
    of one number have one size in all of them, as before; that takes a collective per pass.

    Batches are named by their number in the present pass. Numbers, not a queue: workers may draw
    ahead, a pass may be broken off, and a resumed epoch skips its first batches.

    The loader may be accelerate's shard of one. A loader that does not tell which example is which
    (`sit_out_refusal`) is a ValueError.

    Example:
        >>> from poprisk_integrations.diagnostics.sitting_out import SittingOut
        >>> experiment = SittingOut(10, share=0.2)
        >>> loader = DataLoader(torch.arange(10), batch_size=5)
        >>> handle = SitOutLoader(loader, experiment, lambda: experiment.begin_epoch(0))
        >>> batches = list(loader)
        >>> [len(batch) for batch in batches], torch.equal(batches[1], handle.indices(1))
        ([4, 4], True)
    """

    def __init__(
        self, loader: Any, experiment: "SittingOut", on_pass: Callable[[], Any] | None = None
    ) -> None:
        reason = sit_out_refusal(loader)
        if reason:
            raise ValueError(f"Invalid loader: {reason}.")
        self._loader: DataLoader[Any] = getattr(loader, "base_dataloader", loader)
        self._experiment = experiment
        self._on_pass = on_pass
        self._attribute = "sampler" if self._loader.batch_sampler is None else "batch_sampler"
        inner = getattr(self._loader, self._attribute)
        if isinstance(inner, VisitorBatches):  # a run that ended by an exception left it here
            inner = inner.before_sitting_out
        self._inner = inner
        self._put(VisitorBatches(inner, self._draw))
        self._sitter_batches = _SitterBatches(self._loader, self._attribute, experiment.seed)
        self._plan = _Pass([], torch.zeros(0, dtype=torch.bool))
        self._is_released = False

    @property
    def batches(self) -> int:
        """Of a pass, in this process."""
        return len(self._inner)

    def indices(self, number: int) -> Tensor:
        """Dataset indices of a batch, int64; its number in the present pass counts from 0."""
        return self._plan.visitors(number)

    def due(self, number: int) -> range:
        """Groups of sitters to measure right before a batch.

        Sitters come in the order of the sampler, at the places where they would have been trained
        on. Every process gets the same number of groups of the same sizes at the same places,
        since the forward pass of a sharded model takes them all; where one has fewer sitters,
        other examples fill up, behind those that have indices.
        """
        return self._plan.due(number)

    def sitters(self, group: int) -> tuple[Any, Tensor, int]:
        """A group as a batch, its sitters' dataset indices, and how many examples are in it."""
        measured, drawn = self._plan.group(group)
        return self._sitter_batches.batch(group), measured, len(drawn)

    def sample(self) -> tuple[Any, Tensor]:
        """A batch of the first examples, and their dataset indices: to look at before a run."""
        size = getattr(self._inner, "batch_size", None) or 4
        drawn = torch.arange(min(size, len(self._loader.dataset)))  # type: ignore[arg-type]
        batches = _SitterBatches(self._loader, self._attribute, self._experiment.seed, workers=0)
        batches.groups = [drawn.tolist()]
        return batches.batch(0), drawn

    def release(self) -> None:
        """From the next batch that is not drawn yet: nobody sits out any more. Collective."""
        self._is_released = True
        rest = self._plan.rest()
        self._plan.release(rest, self._largest((len(rest), 0))[0])

    def undo(self) -> None:
        """Give the loader back as it was."""
        self._put(self._inner)
        self._sitter_batches.close()

    def _draw(self, inner: Any) -> Iterator[list[int]]:
        """One pass."""
        if self._on_pass is not None:
            self._on_pass()
        iterator = iter(inner)
        parts = itertools.islice(iterator, len(inner))
        lists = [[int(index) for index in part] for part in parts]
        sits = self._experiment.sits()
        self._plan = plan = _Pass(lists, torch.zeros_like(sits) if self._is_released else sits)
        plan.fit(*self._largest(plan.counts))
        self._sitter_batches.close()
        self._sitter_batches.groups = [plan.group(g)[1].tolist() for g in range(plan.groups)]
        for number in range(len(lists)):
            plan.drawn = number + 1
            yield plan.visitors(number).tolist()
        for _ in iterator:  # a sampler that is asked for its end may draw random numbers for it
            pass

    def _largest(self, counts: tuple[int, int]) -> tuple[int, int]:
        """Each of the process that has most."""
        if world_size() == 1:
            return counts
        every = torch.tensor(counts, device=self._experiment.device)
        dist.all_reduce(every, dist.ReduceOp.MAX)
        first, second = every.tolist()
        return first, second

    def _put(self, sampler: Any) -> None:
        # Not setattr: a loader refuses it once it is made. Persistent workers hold the old sampler.
        object.__setattr__(self._loader, self._attribute, sampler)
        if self._loader._iterator is not None:
            self._loader._iterator = None


class VisitorBatches(BatchSampler):
    """Stands in a loader's place of a batch sampler; shows that one's attributes."""

    before_sitting_out: Any
    lists_of: Callable[[Any], Iterator[list[int]]]

    def __init__(self, inner: Any, draw: Callable[[Any], Iterator[list[int]]]) -> None:
        self.__dict__.update(before_sitting_out=inner, lists_of=draw)

    def __iter__(self) -> Iterator[list[int]]:
        # A generator: nothing is drawn, and no random number used, before the first is asked for.
        yield from self.lists_of(self.before_sitting_out)

    def __len__(self) -> int:
        return len(self.before_sitting_out)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "before_sitting_out":
            raise AttributeError(name)
        return getattr(self.before_sitting_out, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.before_sitting_out, name, value)


class _SitterBatches:
    """Loads groups of examples as the user's loader does, with one worker if that has workers."""

    def __init__(
        self, loader: "DataLoader[Any]", attribute: str, seed: int, workers: int = 1
    ) -> None:
        self.groups: list[list[int]] = []
        self._next = -1
        self._running: Iterator[Any] | None = None
        self._attribute = attribute
        workers = min(workers, loader.num_workers)
        self._dataset = loader.dataset
        self._options: dict[str, Any] = {
            "num_workers": workers,
            "collate_fn": loader.collate_fn,
            "timeout": loader.timeout if workers else 0,
            "worker_init_fn": loader.worker_init_fn,
            "multiprocessing_context": loader.multiprocessing_context if workers else None,
            "generator": torch.Generator().manual_seed(seed % 2**63),
        }
        if attribute == "sampler":
            self._options["batch_size"] = None

    def batch(self, group: int) -> Any:
        """One group; the worker loads those behind it ahead."""
        if self._running is None or group != self._next:
            order: dict[str, Any] = {self._attribute: self.groups[group:]}
            self._running = iter(DataLoader(self._dataset, **order, **self._options))
        self._next = group + 1
        return next(self._running)

    def close(self) -> None:
        """Let a worker end."""
        self._running = None


class _Pass:
    """The batches of one pass in one process, and when its sitters are measured.

    `lists` are those of all examples, as the user's sampler has them; `sits` says over the data
    set who sits out.
    """

    def __init__(self, lists: Sequence[Sequence[int]], sits: Tensor) -> None:
        sizes = torch.tensor([len(part) for part in lists], dtype=torch.int64)
        self._order = torch.tensor([i for part in lists for i in part], dtype=torch.int64)
        self._sits = sits[self._order]
        if self._sits.all():  # of so few, they are visited
            self._sits = torch.zeros_like(self._sits)
        self._sitters = self._order[self._sits]
        self._visitors = self._order[~self._sits]
        self._ends_before = sizes.cumsum(0)
        # Lists of one length but for a short last one are cut anew; others have their reasons.
        self._varies = bool((sizes[:-1] != sizes[:1]).any() or (sizes[-1:] > sizes[:1]).any())
        self._ends = self._ends_before
        self._group_size = 1
        self.drawn = 0
        # Who sits in all processes: their number must not depend on this one's share.
        share, batches = float(sits.float().mean()) if len(sits) else 0.0, len(lists)
        wanted = max(round(share * batches), min(_MEASURED_PER_EPOCH, batches))
        self.groups = wanted if share > 0 else 0
        stride = batches / max(1, self.groups)
        self._places = [round((g + 0.5) * stride - 0.5) for g in range(self.groups)]

    @property
    def counts(self) -> tuple[int, int]:
        """Visitors and sitters, or more visitors where each batch must have one."""
        return max(len(self._visitors), len(self._ends_before)), len(self._sitters)

    def fit(self, visitors: int, sitters: int) -> None:
        """Take the sizes of the process that has most."""
        self._group_size = -(-sitters // max(1, self.groups))
        if self._varies:
            self._ends = (~self._sits).cumsum(0)[self._ends_before - 1]
        elif len(self._ends_before):
            self._visitors = _lengthened(self._visitors, visitors)
            self._ends = self._cut(0, visitors)

    def visitors(self, number: int) -> Tensor:
        """Dataset indices of a batch."""
        start = int(self._ends[number - 1]) if number else 0
        end, count = int(self._ends[number]), len(self._visitors)
        if start < end:
            return self._visitors[start:end]
        again = (start + count // 2) % count
        return self._visitors[again : again + 1]

    def due(self, number: int) -> range:
        """Groups of sitters whose mean place is that of this batch."""
        return range(bisect_left(self._places, number), bisect_left(self._places, number + 1))

    def group(self, group: int) -> tuple[Tensor, Tensor]:
        """Who of a group is measured, and who is drawn: these, and others to fill up."""
        count = len(self._sitters)
        start, end = (count * g // self.groups for g in (group, group + 1))
        measured = self._sitters[start:end]
        missing = self._group_size - len(measured) if world_size() > 1 else 1 - len(measured)
        return measured, torch.cat([measured, _cycled(self._order, max(0, missing))])

    def rest(self) -> Tensor:
        """Who is to come, if nobody sits any more: sitters whose place is over wait for a pass."""
        done, place = self._drawn_so_far()
        gone = torch.zeros(len(self._order), dtype=torch.bool)
        gone[:place] = self._sits[:place]
        is_drawn = torch.isin(self._order, self._visitors[:done])
        return self._order[~gone & ~is_drawn]

    def release(self, rest: Tensor, size: int) -> None:
        """Fill the batches not drawn yet from `rest`; `size` is that of the one that has most."""
        if not self._sits.any() or self._varies or self.drawn >= len(self._ends):
            return
        done, _ = self._drawn_so_far()
        size = max(size, len(self._ends) - self.drawn)
        self._sits = torch.zeros_like(self._sits)
        self._visitors = torch.cat([self._visitors[:done], _cycled(rest, size)])
        self._ends = torch.cat([self._ends[: self.drawn], self._cut(self.drawn, size) + done])

    def _drawn_so_far(self) -> tuple[int, int]:
        """Visitors, and places in the user's order."""
        if not self.drawn:
            return 0, 0
        return int(self._ends[self.drawn - 1]), int(self._ends_before[self.drawn - 1])

    def _cut(self, first: int, count: int) -> Tensor:
        """Ends of the batches from `first` on, among `count` examples, as long as they were."""
        before = int(self._ends_before[first - 1]) if first else 0
        ends = self._ends_before[first:] - before
        cuts = (ends.double() * count / max(1, int(ends[-1]))).round().long()
        places = torch.arange(len(cuts))
        cuts = torch.maximum(cuts, places + 1).cummax(0).values  # none is empty
        return torch.minimum(cuts, count - places.flip(0))


def _lengthened(visitors: Tensor, length: int) -> Tensor:
    """Where they are too few, evenly spread some of the other half of the epoch."""
    count = len(visitors)
    places = torch.arange(length) * count // length
    again = torch.cat([torch.zeros(1, dtype=torch.bool), places[1:] == places[:-1]])
    return visitors[torch.where(again, (places + count // 2) % count, places)]


def _cycled(examples: Tensor, length: int) -> Tensor:
    return examples[torch.arange(length) % max(1, len(examples))]

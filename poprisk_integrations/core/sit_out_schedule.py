"""Who sits out of which epoch: a randomised design, the same on every rank and after a resume."""

import math

import torch
from torch import Tensor

__all__ = ["first_epochs", "smallest_pool"]

UNKNOWN_LENGTH = 100  # epochs, where nobody says how long a run is
_MOST = 2000  # sitters: more would make the estimate hardly better, and cost training
_SHORT_RUN = 10  # epochs: up to here every visit counts, so half the share sits
_FIRST_JOIN = 0.5  # of the run: until then nobody joins
_ALL_JOINED = 0.75  # of the run, but for those of the last epoch: so that they still learn
_JOIN_LAST = 0.1  # of the sitters join in the last epoch
_FEWEST_LAST = 12  # examples


def first_epochs(
    examples: int, *, share: float = 0.15, seed: int = 0, epochs: float | None = None
) -> Tensor:
    """The epoch in which each example is trained on for the first time.

    A random `share` of the examples, at most 2,000, sits out from the start and joins late: one
    after the other between half and three quarters of the run, but a tenth of them (of short runs
    and of few examples more) in the last epoch. Until an example joins, its loss is that of data
    never trained on; afterwards it is training data like the others, so none is lost.

    Args:
        examples: Number of examples.
        share: Of them that sits from the start, in (0, 0.5]; half of it, but not fewer than twelve
            where there are as many, in runs of two to ten epochs. Nobody sits in a run of one.
        seed: The same on all ranks.
        epochs: Planned passes over the data; None if unknown (then as if there were 100).

    Returns:
        Shape (examples,), int64: 0 for those trained on from the start. Example i sits out of
        epoch e (counted from 0) where e < result[i].

    Example:
        >>> joins = first_epochs(1000, share=0.2, epochs=3)
        >>> [int((joins > epoch).sum()) for epoch in range(3)]
        [100, 34, 0]
    """
    joins = torch.zeros(examples, dtype=torch.int64)
    run = _whole_epochs(epochs)
    sitters = _sitters(examples, share, run)
    if sitters == 0:
        return joins
    last = _last_joiners(sitters, run)
    start = max(1.0, _FIRST_JOIN * run)
    end = max(start, min(_ALL_JOINED * run, run - 1))
    stagger = start + (end - start) * torch.arange(sitters - last) / max(1, sitters - last)
    generator = torch.Generator().manual_seed(seed % 2**63)
    chosen = torch.randperm(examples, generator=generator)[:sitters]
    joins[chosen] = torch.cat([stagger.floor().long(), torch.full((last,), run - 1)])
    return joins


def smallest_pool(examples: int, *, share: float, epochs: float | None) -> float:
    """Examples that join in the last epoch: what the last estimates of a run rest on."""
    run = _whole_epochs(epochs)
    return examples if run <= 1 else _last_joiners(_sitters(examples, share, run), run)


def _whole_epochs(epochs: float | None) -> int:
    return UNKNOWN_LENGTH if epochs is None else max(1, math.ceil(epochs))


def _sitters(examples: int, share: float, run: int) -> int:
    if run <= 1:
        return 0  # every loss is that of new data
    whole = round(share * examples)
    if run > _SHORT_RUN:
        return min(_MOST, whole)
    return min(_MOST, max(round(share * examples / 2), min(whole, _FEWEST_LAST)))


def _last_joiners(sitters: int, run: int) -> int:
    if run == 2:
        return sitters
    share = max(_JOIN_LAST, 1 / run if run <= _SHORT_RUN else 0.0)
    return min(sitters, max(_FEWEST_LAST, math.ceil(share * sitters)))

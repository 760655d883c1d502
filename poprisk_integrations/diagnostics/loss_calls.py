"""Torch's loss functions, and what one call of them says about the examples of a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "PLACES",
    "LossCall",
    "LossPlace",
    "NotPerExample",
    "is_computed",
    "is_two_steps",
    "look",
    "row_sums",
]

_CHUNK = 1 << 24  # elements of scores whose losses are computed at a time: 64 MB in float32


class LossPlace(NamedTuple):
    """Where a loss function is found, and where it takes its target and reduction."""

    owner: Any
    name: str
    reduction: int  # position; where it is not given so, a keyword of this name
    target: int = 1
    sums: bool = False  # a row's loss is the sum of its elements, by definition


# What torch.nn.functional itself calls: seen whichever name the user's code knows a loss by (a
# module, a partial, an import), and no other operation of the forward pass becomes slower.
PLACES = (
    LossPlace(torch._C._nn, "cross_entropy_loss", 3),
    LossPlace(torch._C._nn, "nll_loss_nd", 3),
    LossPlace(torch._C._nn, "binary_cross_entropy", 3),
    LossPlace(torch._C._nn, "mse_loss", 2),
    LossPlace(torch._C._nn, "l1_loss", 2),
    LossPlace(torch._C._nn, "smooth_l1_loss", 2),
    LossPlace(torch._C._nn, "huber_loss", 2),
    LossPlace(torch._C._nn, "soft_margin_loss", 2),
    LossPlace(torch._C._nn, "multi_margin_loss", 5),
    LossPlace(torch._C._nn, "multilabel_margin_loss", 2),
    LossPlace(torch, "binary_cross_entropy_with_logits", 4),
    LossPlace(torch, "kl_div", 2, sums=True),
    LossPlace(torch, "poisson_nll_loss", 5),
    LossPlace(torch, "ctc_loss", 5),
    LossPlace(torch, "hinge_embedding_loss", 3),
    LossPlace(torch, "margin_ranking_loss", 4, target=2),
    LossPlace(torch, "cosine_embedding_loss", 4, target=2),
    LossPlace(torch, "triplet_margin_loss", 7),
    LossPlace(F, "gaussian_nll_loss", 5),
    LossPlace(F, "multilabel_soft_margin_loss", 5),
)
_CLASSES = {"cross_entropy_loss", "nll_loss_nd"}
_TWO_CLASSES = {"binary_cross_entropy": 0.5, "binary_cross_entropy_with_logits": 0.0}


@dataclass(slots=True)
class LossCall:
    """A loss of the step: along its first dimension, sums over all others."""

    name: str
    losses: Tensor  # (N,)
    counts: Tensor  # (N,): of how many elements
    correct: Tensor | None  # (N,)
    is_mean: bool  # the user's loss is the mean over what counts, else a sum
    is_open: bool  # the user's code reduces it, and may leave elements out
    elements: list[Tensor]  # then, per call: (n, ...)
    edges: list[Any]  # per call: of the user's loss in the graph
    results: list[Tensor]  # per call: the user's loss
    weights: list[Tensor]  # per call: derivatives of the trained loss, once they are needed
    targets: tuple[int, int]  # where they lie: storage, offset


class NotPerExample(Exception):
    """Why losses do not belong to rows."""


def look(
    place: LossPlace,
    function: Any,
    args: tuple[Any, ...],
    kwargs: Any,
    result: Tensor,
    *,
    rows: int,
    is_first: bool,
) -> LossCall:
    """What a call of a loss function, with its arguments and result, says about its rows.

    `is_first`: whether to look for contrastive scores, which synchronises. A loss that belongs to
    no single row raises NotPerExample.
    """
    name, target = place.name, args[place.target]
    is_positional = len(args) > place.reduction
    code = args[place.reduction] if is_positional else kwargs.get("reduction", "mean")
    is_none, is_mean = code in (0, "none"), code in (1, "mean")
    losses = result.detach() if is_none else _unreduced(place, function, args, kwargs)
    if name == "ctc_loss" and is_mean:
        losses = losses / args[3].to(losses).clamp(min=1)  # as its mean does
    if name in _CLASSES and is_first and _is_contrastive(args[0], target, rows):
        raise NotPerExample(
            "every example is scored against all others of its batch, so no loss belongs to "
            "one of them"
        )
    correct = _correct(name, args, target, losses)
    if name in _CLASSES and not target.is_floating_point():
        is_counted = target != args[4]
        counts = row_sums(is_counted)
        correct = None if correct is None else correct & is_counted
    else:
        shape = losses.shape[:1] or (1,)
        width = 1 if place.sums and not is_mean else losses.numel() // max(1, shape[0])
        counts = torch.full(shape, width, device=losses.device)
    is_open = is_none and losses.numel() > rows
    return LossCall(
        name=name,
        losses=row_sums(losses),
        counts=counts,
        correct=None if correct is None else row_sums(correct),
        is_mean=is_mean,
        is_open=is_open,
        elements=[losses] if is_open else [],
        edges=[],
        results=[],
        weights=[],
        targets=(
            (target.untyped_storage().data_ptr(), target.storage_offset())
            if target.is_contiguous()
            else (-1, 0)
        ),
    )


def is_computed(args: tuple[Any, ...]) -> bool:
    """Whether tensors hold numbers: not those of a compiler's trace, nor shards."""
    if torch.compiler.is_compiling() or len(args) < 2:
        return False
    dispatch, tensors = Tensor.__torch_dispatch__, [a for a in args[:2] if isinstance(a, Tensor)]
    return all(type(a).__torch_dispatch__ is dispatch and not a.is_meta for a in tensors)


def is_two_steps(args: tuple[Any, ...]) -> bool:
    """Whether torch computes cross entropy as log_softmax and nll_loss, to the bit.

    Then the first step, which every example needs, is not computed twice. Autocast casts half
    precision elsewhere on each kind of device.
    """
    scores, target, smoothing = args[0], args[1], args[5]
    is_cast = torch.is_autocast_enabled(scores.device.type) and scores.element_size() < 4
    return not (is_cast or smoothing or target.is_floating_point())


def _unreduced(
    place: LossPlace, function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    own = [a.detach() if isinstance(a, Tensor) else a for a in args]
    if len(own) <= place.reduction:
        return function(*own, **{**kwargs, "reduction": "none"})
    own[place.reduction] = "none" if place.owner is F else 0
    scores = own[0]
    if place.name not in _CLASSES or scores.numel() <= _CHUNK or scores.dim() < 2:
        return function(*own, **kwargs)
    size = max(1, _CHUNK // (scores.numel() // len(scores)))
    pieces = zip(scores.split(size), own[1].split(size), strict=True)
    return torch.cat([function(*piece, *own[2:], **kwargs) for piece in pieces])


def _correct(name: str, args: tuple[Any, ...], target: Tensor, losses: Tensor) -> Tensor | None:
    """Which classes were predicted, in the shape of the losses; None where there are no classes."""
    if name in _TWO_CLASSES:
        scores: Tensor = args[0]
        return (scores > _TWO_CLASSES[name]) == (target > 0.5)
    if name not in _CLASSES:
        return None
    scores = args[0].detach()
    dim = min(1, scores.dim() - 1)
    if target.is_floating_point():
        return scores.argmax(dim) == target.argmax(dim)
    best = scores.amax(dim)  # much cheaper than argmax
    if name == "nll_loss_nd" and args[2] is None:
        return -losses >= best
    own = target.clamp(0, scores.shape[dim] - 1).unsqueeze(dim)  # those ignored lie outside
    return scores.gather(dim, own).squeeze(dim) >= best


def _is_contrastive(scores: Tensor, target: Tensor, rows: int) -> bool:
    if scores.dim() != 2 or target.dim() != 1 or rows < 2:
        return False
    is_square = len(scores) == scores.shape[1] and len(scores) % rows == 0
    return is_square and len(set(target.tolist())) == len(scores)


def row_sums(values: Tensor) -> Tensor:
    """Over all dimensions but the first."""
    return values.flatten(1).sum(1) if values.dim() > 1 else values.reshape(-1)

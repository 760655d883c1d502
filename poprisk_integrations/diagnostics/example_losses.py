"""What each example of a batch loses in an ordinary forward pass, from torch's loss functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from poprisk_integrations.diagnostics.loss_calls import (
    PLACES,
    LossCall,
    LossPlace,
    NotPerExample,
    is_computed,
    is_two_steps,
    look,
    row_sums,
)

__all__ = ["ExampleLosses"]

_NEARLY_ALL = 0.02  # of a loss; in half precision sums differ by less
_ASK = "Pass example_losses=f(module, batch) -> Tensor (B,)."


class ExampleLosses:
    """Records the losses per example that a forward pass computes anyway.

        value_i = sum of the losses of row i / number of its elements that count

    Between `start` and `stop`, calls of torch's loss functions (cross entropy, nll, mse, l1,
    smooth l1, huber, bce, gaussian and poisson nll, kl, ctc, margins; as functions or modules) are
    looked at: their results and the graph stay the same, to the bit. Class weights count as in
    `reduction="none"`. Elements are averaged within a row, except for `kl_div`, which is a sum;
    what `ignore_index` names does not count. Scores of (B, C), (B, C, T), and flattened from
    (B, T) are understood, also in pieces along the batch. Accuracy is recorded where classes are
    predicted; a tie for the largest score counts as correct.

    With several losses in a step, the derivative of the trained loss with respect to each says
    what it weighs; the same with `reduction="none"`, where it says which elements count. It
    reaches back to the losses only, not into the model. Losses on which the trained one does not
    depend (those of a logged metric) are left out.

    Nothing is synchronised, but the first batch is looked at for scores of every example against
    every other (contrastive losses), which have no loss per example.

    Example:
        >>> tap, classes = ExampleLosses(), torch.tensor([0, 1, 2, 0])
        >>> scores = torch.zeros(4, 3, requires_grad=True)
        >>> tap.start(rows=4)
        >>> loss = torch.nn.functional.cross_entropy(scores, classes)
        >>> tap.stop(loss)["loss"]
        tensor([1.0986, 1.0986, 1.0986, 1.0986])
    """

    def __init__(self) -> None:
        self.reason = ""  # why the last pass gave nothing, in one sentence; "" if it did
        self.rows = 0  # examples of the present batch
        # Of the first batch, where they differ: what torch's loss functions make of the trained
        # loss, and that loss. What else there is in it is not among the losses per example.
        self.part: tuple[float, float] | None = None
        self._calls: list[LossCall] = []
        self._listeners = [(place, self._listener(place)) for place in PLACES]
        self._replaced: dict[LossPlace, Callable[..., Any]] = {}  # while it records
        self._is_inside = False  # a loss function, which may call another
        self._grad_mode = True
        self._is_first = True

    @property
    def is_on(self) -> bool:
        """Whether it records."""
        return bool(self._replaced)

    def start(self, rows: int) -> None:
        """Record from here on, for a batch of so many examples."""
        self.stop()
        self.rows, self.reason = rows, ""
        self._grad_mode = torch.is_grad_enabled()
        for place, listener in self._listeners:
            self._replaced[place] = getattr(place.owner, place.name)
            setattr(place.owner, place.name, listener)

    def stop(
        self, total: Tensor | None = None, *, scale: Tensor | float = 1.0
    ) -> dict[str, Tensor] | None:
        """Record no further, and give "loss" and, for classes, "accuracy"; None for the `reason`.

        They are float32 of length `rows`, detached, on their device; NaN where nothing in the row
        counts. `total` is the loss that is trained on, before it is differentiated, and `scale`
        what it has been multiplied by. It is needed with several losses, and with
        `reduction="none"` over more than one element per row.
        """
        if not self.is_on:
            return None
        for place, function in self._replaced.items():
            setattr(place.owner, place.name, function)
        self._replaced = {}
        torch.set_grad_enabled(self._grad_mode)
        calls, self._calls = self._calls, []
        try:
            return None if self.reason else self._values(calls, total, scale)
        except NotPerExample as error:
            self.reason = f"{error}. {_ASK}"
            return None

    @contextmanager
    def recording(self, rows: int) -> Iterator[Recording]:
        """`start` and `stop` around a block, which may set `total` of what it gets."""
        record = Recording()
        self.start(rows)
        try:
            yield record
        finally:
            record.values = self.stop(record.total)
            record.reason = self.reason

    def _listener(self, place: LossPlace) -> Callable[..., Any]:
        """Made once, so that a compiler that guards on the function compiles once."""
        original = getattr(place.owner, place.name)

        def listener(*args: Any, **kwargs: Any) -> Any:
            function = self._replaced.get(place, original)
            if not is_computed(args) or self._is_inside or self.reason:
                return function(*args, **kwargs)
            self._is_inside = True
            try:
                return self._hear(place, function, args, kwargs)
            finally:
                self._is_inside = False

        return listener

    def _hear(self, place: LossPlace, function: Any, args: tuple[Any, ...], kwargs: Any) -> Tensor:
        """The function's own result; what it says about examples is kept."""
        if place.name == "cross_entropy_loss" and is_two_steps(args):
            logs = torch.log_softmax(args[0], min(1, args[0].dim() - 1))
            args, function = (logs, *args[1:5]), torch._C._nn.nll_loss_nd
        result: Tensor = function(*args, **kwargs)
        with torch.no_grad():
            try:
                call = look(
                    place,
                    function,
                    args,
                    kwargs,
                    result,
                    rows=self.rows,
                    is_first=self._is_first,
                )
            except NotPerExample as error:
                self.reason = f"{error}. {_ASK}"
                return result
        if not self._grad_mode:  # a graph from here on shows what the losses weigh
            torch.set_grad_enabled(True)
            result = result.detach().requires_grad_().clone()  # a leaf must not change in place
        call.edges.append(get_gradient_edge(result) if result.requires_grad else None)
        call.results.append(result.detach())
        self._calls.append(call)
        return result

    def _values(
        self, calls: list[LossCall], total: Tensor | None, scale: Tensor | float
    ) -> dict[str, Tensor]:
        if not calls:
            raise NotPerExample(
                "no call of a loss function of torch was seen (one of your own, a fused or a "
                "compiled one)"
            )
        calls = _joined(calls, self.rows)
        is_first, self._is_first = self._is_first, False
        if len(calls) > 1 or calls[0].is_open or (is_first and total is not None):
            calls = _weighed(calls, total)  # at first also of one: it may be only a metric's
        if is_first and total is not None:
            self.part = _part(calls, total.detach())
        losses: list[Tensor] = []
        for call in calls:
            own = _row_means(call, self.rows)
            if len(calls) > 1:
                own = own * (_share(call) / scale).to(own.device)
            losses.append(own.to(losses[0].device) if losses else own)
        values = {"loss": sum(losses[1:], losses[0]).float()}
        found = [(call.correct, call.counts) for call in calls if call.correct is not None]
        if len(found) == 1:
            correct, counts = found[0]
            values["accuracy"] = _by_row(correct, self.rows) / _by_row(counts, self.rows)
        return values


@dataclass(slots=True)
class Recording:
    """What a block around a forward pass said."""

    total: Tensor | None = None  # to be set in the block, for `ExampleLosses.stop`
    values: dict[str, Tensor] | None = None
    reason: str = ""


def _joined(calls: list[LossCall], rows: int) -> list[LossCall]:
    """One call for those whose targets are the next part of those of the call before."""
    joined = calls[:1]
    for call in calls[1:]:
        last = joined[-1]
        (storage, offset), (next_storage, next_offset) = last.targets, call.targets
        is_next = storage == next_storage != -1 and offset < next_offset
        if not is_next or last.name != call.name:
            joined.append(call)
        elif len(call.losses) == len(last.losses) == rows:
            raise NotPerExample(
                f"{last.name} is called with parts of one tensor as long as the batch: of other "
                "rows, or of the same ones"
            )
        else:
            _join(last, call)
    return joined


def _join(call: LossCall, piece: LossCall) -> None:
    call.targets = piece.targets
    call.losses = torch.cat([call.losses, piece.losses])
    call.counts = torch.cat([call.counts, piece.counts])
    if call.correct is not None and piece.correct is not None:
        call.correct = torch.cat([call.correct, piece.correct])
    call.is_open |= piece.is_open
    call.elements += piece.elements
    call.edges += piece.edges
    call.results += piece.results


def _weighed(calls: list[LossCall], total: Tensor | None) -> list[LossCall]:
    """The losses on which the trained one depends, each with its derivatives."""
    if total is None:
        raise NotPerExample(
            f"{len(calls)} losses in a step ({', '.join(call.name for call in calls)}), and "
            "nothing shows how they make the one that is trained on"
        )
    edges = [edge for call in calls for edge in call.edges if edge is not None]
    if total.requires_grad and edges:
        found = torch.autograd.grad(total, edges, retain_graph=True, allow_unused=True)
        derivatives = iter(found)
        for call in calls:
            own = [None if edge is None else next(derivatives) for edge in call.edges]
            call.weights = [weight for weight in own if weight is not None]
            if 0 < len(call.weights) < len(own):
                raise NotPerExample(f"only some of the calls of {call.name} are trained on")
    used = [call for call in calls if call.weights]
    if not used:
        raise NotPerExample("the trained loss does not depend on a loss function of torch")
    return used


def _part(calls: list[LossCall], total: Tensor) -> tuple[float, float] | None:
    """What the calls make of the trained loss, and that loss; None where they make all of it."""
    makes = sum(
        float((weight * result).sum())
        for call in calls
        for weight, result in zip(call.weights, call.results, strict=True)
    )
    whole = float(total)
    return None if abs(whole - makes) <= _NEARLY_ALL * abs(whole) else (makes, whole)


def _share(call: LossCall) -> Tensor:
    """What the mean of a loss over its elements weighs in the trained one."""
    weights = call.weights
    together = torch.stack([weight.sum() for weight in weights]).sum()
    if call.is_mean or call.is_open:
        return together
    return together / len(weights) * (call.counts.sum() if weights[0].dim() == 0 else 1)


def _row_means(call: LossCall, rows: int) -> Tensor:
    sums, counts = call.losses, call.counts
    if call.is_open:
        weighted = zip(call.weights, call.elements, strict=True)
        sums = torch.cat([row_sums(weight * each) for weight, each in weighted])
        counts = torch.cat([row_sums(weight) for weight in call.weights])
    return _by_row(sums, rows) / _by_row(counts, rows)


def _by_row(values: Tensor, rows: int) -> Tensor:
    """Sums of (N,) as (rows, N / rows)."""
    if len(values) == rows:
        return values
    if len(values) % rows:
        raise NotPerExample(f"a loss of {len(values)} rows for {rows} examples")
    return values.view(rows, -1).sum(1)

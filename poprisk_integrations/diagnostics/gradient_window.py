"""Accumulates batch gradients over a window of optimizer steps and closes it with F."""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from poprisk_integrations.core.window import (
    WindowRatio,
    mean_standard_error,
    window_signal_ratio,
)
from poprisk_integrations.diagnostics.run_length import SHORTEST_WINDOW
from poprisk_integrations.diagnostics.window_layout import WindowLayout
from poprisk_integrations.diagnostics.window_sums import WindowBuffers

__all__ = ["BY_POSITION", "GradientWindow", "empty_state", "pair_stride", "window_fits"]

# Pairs of consecutive steps in a long window, behind risk decrease and agreement: their standard
# error grows with fewer of them, the cost of a step with more (recipes/benchmarks/stop_cost).
PAIRS = 24
BY_POSITION = ("sums", "squares", "previous", "last_grads")  # of a state: a tensor per parameter


def pair_stride(steps: int) -> int:
    """Every how many steps of a window a pair of consecutive steps ends.

    1 in windows below 72 steps; every second step would read as much as every step.
    """
    stride = steps // PAIRS
    return stride if stride > 2 else 1


class GradientWindow:
    """Running sums A_l = sum_t g_t and |g_t|^2 per tensor and step, for any optimizer.

    Call `add` once per optimizer step, before the step, when the gradients are complete: averaged
    over micro-batches and ranks, unscaled, and best unclipped (`scale` undoes both). Gradients
    are read, never written. A step with a non-finite gradient (a skipped fp16 step) is left out,
    decided on the device: no host sync before the window closes, and no communication, but for
    one reduction of L numbers per step where tensors are sharded. A window closes with F, its
    standard error, the population-risk decrease along the steps that were taken, and the
    agreement of consecutive batches (`core.WindowRatio`, `window_sums.StepPairs`).

    Args:
        steps: Optimizer steps in a window, >= 4.
        accumulator: "exact" keeps two fp32 buffers per trained parameter, 8 bytes each. "sample"
            reads 16,384 fixed coordinates of each large tensor (`CoordinateSample`), also for
            |g_t|^2 and to tell whether a step is finite: 12 bytes per sampled coordinate (on the
            CPU 40, for steps wait in groups of eight), 45 MB for a model of 7B parameters instead
            of 54 GB. "auto": exact while a process trains at most 25 million parameters.
        shard_group: Process group over which tensors that are no DTensors are sharded (FSDP1,
            DeepSpeed ZeRO). A rank may hold an empty shard, or no gradient where others do.
        measure_risk: Whether to measure risk decrease and agreement, from the sampled coordinates
            with either accumulator: 12 to 16 bytes more per sampled coordinate (on the CPU 40
            to 72). Windows of 72 steps or more measure 24 to 31 pairs of consecutive steps.
        epoch_steps: Optimizer steps of one pass over the data; None if unknown. A longer window
            sees each example more than once, which F allows for.
        numel: Coordinates of the whole tensors, float64, where only samples of them are offered.

    Attributes:
        restarts: Unfinished windows given up since the last close, for other parameters.
        seen: Optimizer steps in the unfinished window, finite or not.

    Raises:
        ValueError: If `steps` < 4 or `accumulator` is unknown.

    Example:
        >>> p = torch.nn.Parameter(torch.zeros(()))
        >>> window = GradientWindow(steps=5)
        >>> for g in (1.0, 3.0, 2.0, 1.0, 3.0):  # sum 10, variance 1
        ...     p.grad = torch.tensor(g)
        ...     window.add([p])
        >>> window.is_full, round(window.close().ratio, 3)  # (5-3)/(5-1) * 10^2 / (5 * 1)
        (True, 10.0)
    """

    def __init__(
        self,
        steps: int,
        *,
        accumulator: Literal["auto", "exact", "sample"] = "auto",
        shard_group: Any = None,
        measure_risk: bool = True,
        epoch_steps: int | None = None,
        numel: Tensor | None = None,
    ) -> None:
        if steps < SHORTEST_WINDOW:
            raise ValueError(
                f"Invalid steps: {steps}. A window needs at least {SHORTEST_WINDOW} steps."
            )
        if accumulator not in ("auto", "exact", "sample"):
            raise ValueError(
                f"Invalid accumulator: {accumulator!r}. Must be 'auto', 'exact' or 'sample'."
            )
        self.steps = steps
        self.accumulator = accumulator
        self._measure_risk = measure_risk
        self._stride = pair_stride(steps)
        self._passes = max(1.0, steps / epoch_steps) if epoch_steps else 1.0
        self._shard_group = shard_group
        self._numel = numel
        self.restarts = 0
        self.reset()

    @property
    def is_full(self) -> bool:
        """Whether `steps` optimizer steps were offered since the last close."""
        return self.seen >= self.steps

    @torch.no_grad()
    def add(
        self,
        params: Iterable[Tensor],
        *,
        grads: Sequence[Tensor | None] | None = None,
        scale: float | Tensor = 1.0,
    ) -> None:
        """Take in the gradients of one optimizer step, before the step.

        Sums go by position, so a window in which the trained parameters change (frozen, thawed,
        a group added), or whose loaded state does not fit them, starts afresh with this step.
        Who only watches a run must not end it; `restarts` tells.

        Args:
            params: The optimizer's parameters, in the same order at each call. Those without a
                gradient contribute zero.
            grads: Their gradients, one for each or None; None for `.grad` of the parameters that
                require one.
            scale: Multiplies all gradients of this step: a number, or 0-dim on their device.

        Raises:
            ValueError: If their number is not that of `grads`.
        """
        tensors, gradients = _columns(params, grads)
        open_ = self._open_for(tensors) if tensors else None
        self.seen += 1
        # A shard without a gradient still takes part in what all shards reduce.
        if open_ is not None and (
            self._shard_group is not None or any(g is not None for g in gradients)
        ):
            open_.add(tensors, gradients, scale)

    @torch.no_grad()
    def place(self, params: Iterable[Tensor]) -> None:
        """Give a loaded window its tensors without a step, so that a full one can be closed."""
        tensors, _ = _columns(params, None)
        if tensors:
            self._open_for(tensors)

    @torch.no_grad()
    def close(self) -> WindowRatio | None:
        """End the window, and start afresh; None where fewer than four finite steps were seen.

        One host sync. All ranks get the same bits, so all decide alike.
        """
        self.restarts, open_ = 0, self._open
        if self._loaded is not None:  # of tensors that never came
            self.reset()
        self.seen = 0
        if open_ is None:
            return None
        host = None if open_.is_empty else open_.reduced()
        open_.start_window()
        return None if host is None else self._result(open_, host)

    def _result(self, open_: WindowBuffers, host: list[Tensor]) -> WindowRatio | None:
        (norms, sums, ratios, *pairs), layout = host, open_.layout
        is_finite = norms.sum(1).isfinite()
        steps = int(is_finite.sum())
        if steps < SHORTEST_WINDOW:
            return None
        scale = layout.numel / open_.sums.measured.clamp(min=1)
        norm_sq = norms[is_finite] * scale
        result = window_signal_ratio(
            sums * scale,
            norm_sq.sum(0),
            layout.numel,
            steps,
            norm_sq=norm_sq,
            passes=self._passes,
        )
        white, alive = (ratios * scale).sum(1).tolist()
        if alive > 0 and not math.isnan(result.ratio):
            result = replace(result, ratio=white / alive / self._passes)
        if not pairs:
            return result
        scale = layout.numel / layout.sampled.clamp(min=1)
        agreements, products = (pairs[0] * scale).unbind(1)
        gains, has_moved = products.sum(1), pairs[1][:, 0] > 0
        # A step that was not applied says nothing about the direction of those that were.
        counts = is_finite[self._stride - 1 :: self._stride] & gains.isfinite() & has_moved
        # U in units of the noise: sum over tensors of w_l U_t,l / S_l.
        noisy = result.per_tensor.isfinite()
        weight = torch.where(noisy, layout.numel, 0.0)
        agreed = agreements @ torch.where(noisy, weight / weight.sum() / result.noise, 0.0)
        gain, gain_se = mean_standard_error(gains[counts])
        agreement, agreement_se = mean_standard_error(agreed[agreed.isfinite()])
        return replace(
            result,
            risk_decrease=gain,
            risk_decrease_se=gain_se,
            agreement=agreement,
            agreement_se=agreement_se,
        )

    def reset(self) -> None:
        """Forget the unfinished window, and the weights of the last step."""
        self.seen = 0  # steps offered, finite or not: known on the host
        self._open: WindowBuffers | None = None
        self._loaded: dict[str, Any] | None = None  # waits for the tensors that it belongs to

    def state_dict(self) -> dict[str, Any]:
        """The unfinished window and the last weights (of sharded tensors the local part)."""
        if self._loaded is not None:
            return copy.deepcopy(self._loaded)
        measured = {} if self._open is None else self._open.state()
        return {**empty_state(self.accumulator, self.seen), **measured}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue an unfinished window; tensors move to their parameters' device.

        The tensors are compared with the parameters at the next `add`; `window_fits` asks before.

        Raises:
            ValueError: If the state is of another accumulator or of an older version.
        """
        missing = _missing_entries(state_dict)
        if missing:
            raise ValueError(f"Invalid state of a window: it lacks {', '.join(missing)}.")
        saved, wanted = state_dict["accumulator"], self.accumulator
        if "auto" not in (saved, wanted) and saved != wanted:
            raise ValueError(f"The state is of accumulator={saved!r}, the window has {wanted!r}.")
        self.reset()
        self._loaded = copy.deepcopy(dict(state_dict))
        self.seen = int(state_dict["seen"])

    def _open_for(self, tensors: Sequence[Tensor]) -> WindowBuffers:
        """The buffers of these tensors, fresh ones if they are others than before."""
        if self._open is not None and self._open.layout.is_of(tensors):
            return self._open
        layout = WindowLayout(tensors, self.accumulator, self._shard_group)
        loaded, seen = self._loaded, self.seen
        is_other = self._open is not None and seen > 0
        if is_other or (loaded is not None and not _fits(loaded, layout)):
            loaded, seen = None, 0
            self.restarts += 1
        self.reset()
        if self._numel is not None:
            layout.numel = self._numel
        self._open = WindowBuffers(layout, self._stride if self._measure_risk else None)
        self.seen = seen
        if loaded is not None:
            self._open.load(loaded)
        return self._open


def _columns(
    params: Iterable[Tensor], grads: Sequence[Tensor | None] | None
) -> tuple[list[Tensor], list[Tensor | None]]:
    if grads is None:
        tensors = [p for p in params if p.requires_grad]
        return tensors, [p.grad for p in tensors]
    tensors = list(params)
    if len(grads) != len(tensors):
        raise ValueError(f"Invalid grads: {len(grads)} for {len(tensors)} parameters.")
    return tensors, list(grads)


def empty_state(accumulator: str, seen: int) -> dict[str, Any]:
    """The state of a window in which nothing was measured."""
    return {
        "accumulator": accumulator,
        "seen": seen,
        **dict.fromkeys(("counted", "norm_sq", "products", "agreements")),
        **{key: {} for key in BY_POSITION},
    }


def _missing_entries(state_dict: Mapping[str, Any]) -> list[str]:
    """What a state lacks, as one of an older version does."""
    return sorted(set(empty_state("", 0)) - set(state_dict))


def _fits(state_dict: Mapping[str, Any], layout: WindowLayout) -> bool:
    """Whether a state belongs to these tensors."""
    columns, norm_sq = len(layout.locals), state_dict["norm_sq"]
    sampled = [(count,) for count in layout.sample.counts]
    whole = [tuple(t.shape) for t in layout.locals]
    summed = whole if layout.accumulator == "exact" else sampled
    shapes = zip(BY_POSITION, (summed, summed, sampled, sampled), strict=True)
    return (
        state_dict["accumulator"] in ("auto", layout.accumulator)
        and (norm_sq is None or norm_sq.shape[1] == columns)
        and len(state_dict["previous"]) in (0, columns)
        and all(
            int(position) < columns and tuple(tensor.shape) == expected[int(position)]
            for key, expected in shapes
            for position, tensor in state_dict[key].items()
        )
    )


def window_fits(
    state_dict: Mapping[str, Any], params: Iterable[Tensor], shard_group: Any = None
) -> bool:
    """Whether a window's state belongs to parameters of these shapes, frozen ones passed over."""
    tensors = [p for p in params if p.requires_grad]
    if _missing_entries(state_dict):
        return False
    if not tensors:
        return not state_dict["sums"]
    return _fits(state_dict, WindowLayout(tensors, state_dict["accumulator"], shard_group))

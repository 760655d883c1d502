"""The whole step of one tensor as one elementwise function, for compilers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from poprisk_integrations.optim._block_codes import decode_blocks, encode_blocks
from poprisk_integrations.optim._gate_stats import parameter_sums
from poprisk_integrations.optim._moments import MOMENTS
from poprisk_integrations.optim._options import GroupOptions
from poprisk_integrations.optim._rounding import round_to_bfloat16_, uniform16
from poprisk_integrations.optim._scalar_rows import COLUMNS

__all__ = ["FusedPlan", "fused_update", "sampled_sums"]

SAMPLE_NUMEL = 1 << 12


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedPlan:
    """What is fixed when the function is compiled; everything else is data.

    Attributes:
        gate: One of `core.gate.GATES`.
        gated: Whether s is kept and the gate can close.
        centered: False for the published rule, whose first step takes s as m^2.
        gate_decay: Gate the weight decay too.
        maximize: Negate the gradient.
        has_gate_eps: Whether the gate's denominator has a constant.
        rounds_param: Stochastic rounding of a bfloat16 parameter.
        formats: How exp_avg, exp_avg_sq and exp_dev_sq are stored.
        on_device: Whether the row may say that the step does not count.
    """

    gate: str
    gated: bool
    centered: bool
    gate_decay: bool
    maximize: bool
    has_gate_eps: bool
    rounds_param: bool
    formats: tuple[str, str, str]
    on_device: bool

    @property
    def rounds(self) -> bool:
        """Whether anything is rounded stochastically."""
        return self.rounds_param or any(kind in ("bfloat16", "8bit") for kind in self.formats)

    @classmethod
    def of(
        cls,
        options: GroupOptions,
        formats: tuple[str, str, str],
        rounds_param: bool,
        on_device: bool,
    ) -> "FusedPlan":
        """The plan of a group's options for parameters of one kind."""
        return cls(
            gate=options.gate,
            gated=options.gated,
            centered=options.centered,
            gate_decay=options.gate_decay and options.gated,
            maximize=options.maximize,
            has_gate_eps=options.gate_eps > 0,
            rounds_param=rounds_param,
            formats=formats,
            on_device=on_device,
        )


def fused_update(
    param: Tensor,
    grad: Tensor,
    moments: tuple[tuple[Tensor, ...], ...],
    row: Tensor,
    key: Tensor | None,
    offset: Tensor | None,
    plan: FusedPlan,
) -> None:
    """Step of one tensor, in place; the arithmetic of `_single_tensor.py` in its order.

    Args:
        param: float32, float64 or bfloat16; a vector, or a matrix where a moment is in codes.
        grad: Same shape, never written.
        moments: The tensors of exp_avg, exp_avg_sq and exp_dev_sq: the values, or (codes, scale).
        row: Scalars, see `_scalar_rows.COLUMNS`, in the dtype of the arithmetic.
        key: 0-dim int32, see `_rounding.rounding_key`; None where nothing is rounded.
        offset: 0-dim int64, global index of the first element; None where nothing is rounded.
        plan: What is compiled in.
    """
    c = dict(zip(COLUMNS, row.unbind(), strict=True))
    dtype = row.dtype
    exp_avg, exp_avg_sq, exp_dev_sq = (
        _load(tensors, name, kind, dtype)
        for tensors, name, kind in zip(moments, MOMENTS, plan.formats, strict=True)
    )
    g = grad.to(dtype)
    if plan.on_device:
        # zeros instead of a non-finite gradient, so that 0 * g is 0
        g = torch.where(c["keep"] > 0, g * c["grad_factor"], 0.0)
    if plan.maximize:
        g = -g

    if plan.gated:
        deviation = g - c["mean_scale"] * exp_avg
        exp_dev_sq = exp_dev_sq * c["dev_decay"] + c["dev_weight"] * deviation * deviation
    exp_avg = torch.lerp(exp_avg, g, c["mean_weight"])
    exp_avg_sq = exp_avg_sq * c["sq_decay"] + c["sq_weight"] * g * g
    denom = exp_avg_sq.sqrt() / c["bias_correction2_sqrt"] + c["eps"]

    update, gate = exp_avg, None
    if plan.gated:
        gate, _, _ = _gate(exp_avg, exp_dev_sq, c, plan)
        update = exp_avg * gate
    p = param.to(dtype)
    if plan.gate_decay and gate is not None:
        p = p * (1 - c["weight_decay"] * gate)
    else:
        p = p * c["param_scale"]
    p = p - c["step_size"] * update / denom

    _store(param, moments, (p, exp_avg, exp_avg_sq, exp_dev_sq), c["keep"], key, offset, plan)


def sampled_sums(moments: tuple[tuple[Tensor, ...], ...], row: Tensor, plan: FusedPlan) -> Tensor:
    """Columns of the gate statistics, from the states after a step.

    Of a tensor above `SAMPLE_NUMEL` elements, some at regular distances are looked at, and their
    sums scaled up: reductions in the compiled step would cost more than the step.

    Args:
        moments: As in `fused_update`.
        row: As in `fused_update`.
        plan: As in `fused_update`.

    Returns:
        `_gate_stats.COLUMNS`, the learning rate missing.
    """
    numel = moments[0][0].numel()
    # odd: not one column of a matrix
    distance = max(1, numel // SAMPLE_NUMEL) | 1
    exp_avg, exp_avg_sq, exp_dev_sq = (
        _load(tensors, name, kind, row.dtype).reshape(-1)[::distance]
        for tensors, name, kind in zip(moments, MOMENTS, plan.formats, strict=True)
    )
    c = dict(zip(COLUMNS, row.unbind(), strict=True))
    direction = exp_avg / (exp_avg_sq.sqrt() / c["bias_correction2_sqrt"] + c["eps"])
    gate = mean_sq = torch.ones_like(exp_avg)
    noise = torch.full_like(exp_avg, -1.0)
    if plan.gated:
        gate, mean_sq, noise = _gate(exp_avg, exp_dev_sq, c, plan)
        # ungated counts as open, for alpha = 0 too
        noise = torch.where(c["blend"] > 0, noise, -1.0)
        mean_sq = torch.where(c["blend"] > 0, mean_sq, 1.0)
    sums = parameter_sums(mean_sq, noise, gate, direction, c["boundary"], 0.0)
    return sums * (numel / exp_avg.numel())


def _gate(
    exp_avg: Tensor, exp_dev_sq: Tensor, c: dict[str, Tensor], plan: FusedPlan
) -> tuple[Tensor, Tensor, Tensor]:
    """W q + 1 - w, m^2 and s; see `core.gate.gate_factor`."""
    mean_sq = exp_avg * exp_avg
    noise = exp_dev_sq
    if not plan.centered:
        noise = torch.where(c["noise_is_signal"] > 0, mean_sq, noise)
    if plan.gate == "hard":
        q = (mean_sq > c["boundary"] * noise).to(mean_sq.dtype)
    else:
        signal = mean_sq
        if plan.gate == "soft":
            signal = (mean_sq - c["boundary"] * noise).clamp(min=0)
        total = signal + c["penalty"] * noise
        if plan.has_gate_eps:
            total = total + c["gate_eps"]
        q = signal / total.clamp(min=torch.finfo(mean_sq.dtype).tiny)
    return c["blend"] * q + (1 - c["blend"]), mean_sq, noise


def _load(tensors: tuple[Tensor, ...], name: str, kind: str, dtype: torch.dtype) -> Tensor:
    return decode_blocks(tensors[0], tensors[1], name) if kind == "8bit" else tensors[0].to(dtype)


def _store(
    param: Tensor,
    moments: tuple[tuple[Tensor, ...], ...],
    values: tuple[Tensor, Tensor, Tensor, Tensor],
    keep: Tensor,
    key: Tensor | None,
    offset: Tensor | None,
    plan: FusedPlan,
) -> None:
    def draw(stream: str) -> Tensor:
        assert key is not None
        assert offset is not None
        index = torch.arange(param.numel(), device=param.device) + offset
        return uniform16(index.to(torch.int32).view(param.shape), key, stream)

    if plan.rounds_param:
        round_to_bfloat16_(param, values[0], draw("param"))
    else:
        param.copy_(values[0])
    for tensors, name, kind, value in zip(moments, MOMENTS, plan.formats, values[1:], strict=True):
        if name == "exp_dev_sq" and not plan.gated:
            continue
        if kind == "8bit":
            codes, scale = encode_blocks(value, name, draw(name))
            if plan.on_device:
                codes = torch.where(keep > 0, codes, tensors[0])
                scale = torch.where(keep > 0, scale, tensors[1])
            tensors[0].copy_(codes)
            tensors[1].copy_(scale)
        elif kind == "bfloat16":
            round_to_bfloat16_(tensors[0], value, draw(name))
        else:
            tensors[0].copy_(value)

"""The whole step as one elementwise function of tensors of a kind.

It is the path of accelerators without the Triton kernel and of what the kernel does not take: some
30 launches for all parameters of a shape, and no host that knows the step count.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from poprisk_integrations.distributed import is_dtensor, sum_over_shards
from poprisk_integrations.optim._eager import norm_restoring_scale
from poprisk_integrations.optim._gate_stats import parameter_sums, pooled_sums, ungated_sums
from poprisk_integrations.optim._options import MOMENTS, GroupOptions
from poprisk_integrations.optim._rounding import global_index, rounding_key, to_bfloat16, uniform16
from poprisk_integrations.optim._scalars import COLUMNS, positions_on, scalar_rows
from poprisk_integrations.optim._states import decode_blocks, encode_blocks
from poprisk_integrations.optim._work import GroupWork, PooledGate

__all__ = [
    "FusedPlan",
    "capturable_poprisk_adamw",
    "fused_update",
    "gate_of",
    "state_sums",
    "stored",
]

Scalars = dict[str, Tensor]
Parts = tuple[tuple[Tensor, ...], ...]  # tensors of exp_avg, exp_avg_sq, exp_dev_sq as stored
Values = tuple[Tensor, ...]  # parameter, exp_avg, exp_avg_sq and, where there is one, exp_dev_sq


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedPlan:
    """What is the same for all tensors of a kind; everything else is data."""

    gate: str
    gated: bool
    centered: bool
    pooled: str  # "row" or "tensor" where their coordinates share a gate, which is data; else ""
    gate_decay: bool
    maximize: bool
    has_gate_eps: bool
    rounds_param: bool  # stochastic rounding of a bfloat16 parameter
    formats: tuple[str, ...]  # how the moments are stored
    on_device: bool  # the scalars may say that the step does not count

    @property
    def rounds(self) -> bool:
        """Whether anything is rounded stochastically."""
        return self.rounds_param or any(kind != "float32" for kind in self.formats)

    def shape_of(self, param: Tensor) -> tuple[int, ...]:
        """How a tensor is taken: flat, or as a matrix where its rows matter (blocks of codes)."""
        if "8bit" not in self.formats and self.pooled != "row":
            return (param.numel(),)
        return (param.shape[0], param.shape[1:].numel()) if param.dim() else (1, 1)

    def gate_shape(self, rows: int) -> tuple[int, ...]:
        """The shape of a shared gate of a tensor, so that it broadcasts to `shape_of`."""
        return (rows, 1) if self.pooled == "row" else ()

    @classmethod
    def of(cls, options: GroupOptions, work: GroupWork, index: int, on_device: bool) -> "FusedPlan":
        """The plan of a group's options for parameters like one of them."""
        is_low = work.params[index].dtype == torch.bfloat16
        return cls(
            gate=options.gate,
            gated=options.gated,
            centered=options.centered,
            pooled=options.granularity if options.pooled else "",
            gate_decay=options.gate_decay and options.gated,
            maximize=options.maximize,
            has_gate_eps=options.gate_eps > 0,
            rounds_param=is_low and options.stochastic_rounding,
            formats=tuple(moment.kind for moment in work.moments(index)),
            on_device=on_device,
        )


def fused_update(
    param: Tensor,
    grad: Tensor,
    moments: Parts,
    c: Scalars,
    plan: FusedPlan,
    restore: Callable[[Tensor, Tensor], Tensor] | None = None,
    shared_gate: Tensor | None = None,
) -> Values:
    """The step of `single_tensor_poprisk_adamw`, in its order, as new values.

    Any shape; a matrix (or several) where a moment is in codes. The scalars are those of
    `_scalars.COLUMNS` in the dtype of the arithmetic, 0-dim or one per row. `restore` gives the
    factor of the gated update from the ungated and the gated one (`preserve_norm`).
    `shared_gate` is that of `_work.PooledGate`, which broadcasts to the parameter.
    """
    # low-precision parameters and states are updated in float32 and rounded once, at the end
    dtype = c["keep"].dtype
    exp_avg, exp_avg_sq, *noise = _loaded(moments, plan, dtype)
    p, g = param.to(dtype), grad.to(dtype)
    if plan.on_device:
        # zeros instead of a non-finite gradient, so that 0 * g is 0
        g = torch.where(c["keep"] > 0, g * c["grad_factor"], 0.0)
    if plan.maximize:
        g = -g

    # update noise variance, before the mean moves
    if plan.gated and noise:
        deviation = g - c["mean_scale"] * exp_avg
        noise = [noise[0] * c["dev_decay"] + c["dev_weight"] * deviation * deviation]

    # decay the first and second moment running average coefficient
    exp_avg = torch.lerp(exp_avg, g, c["mean_weight"])
    exp_avg_sq = exp_avg_sq * c["sq_decay"] + c["sq_weight"] * g * g
    denom = exp_avg_sq.sqrt() / c["bias_correction2_sqrt"] + c["eps"]

    # gate
    gate = None
    update = exp_avg
    if plan.gated:
        if shared_gate is None:
            gate, _, _ = _gate(exp_avg, exp_avg_sq, noise, c, plan)
        else:
            gate = shared_gate.to(dtype)
        update = exp_avg * gate
        if restore is not None:
            update = update * restore(exp_avg / denom, update / denom)

    # decoupled weight decay, ungated unless the group asks for it
    if plan.gate_decay and gate is not None:
        p = p * (1 - c["weight_decay"] * gate)
    else:
        p = p * c["param_scale"]

    # apply
    return p - c["step_size"] * update / denom, exp_avg, exp_avg_sq, *noise


def _gate(
    exp_avg: Tensor, exp_avg_sq: Tensor, noise: list[Tensor], c: Scalars, plan: FusedPlan
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns w q + 1 - w, m^2 and s; `noise` holds s, if there is one."""
    mean_sq = exp_avg * exp_avg
    spread = noise[0] if noise else (exp_avg_sq * c["noise_scale"] - mean_sq).clamp(min=0)
    if not plan.centered:
        spread = torch.where(c["noise_is_signal"] > 0, mean_sq, spread)
    return gate_of(mean_sq, spread, c, plan), mean_sq, spread


def gate_of(mean_sq: Tensor, noise: Tensor, c: Scalars, plan: FusedPlan) -> Tensor:
    """W q + 1 - w from m^2 and s; see `core.gate.gate_factor`."""
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
    return c["blend"] * q + (1 - c["blend"])


def _loaded(moments: Parts, plan: FusedPlan, dtype: torch.dtype) -> list[Tensor]:
    return [
        decode_blocks(tensors[0], tensors[1], name) if kind == "8bit" else tensors[0].to(dtype)
        for tensors, name, kind in zip(moments, MOMENTS, plan.formats, strict=False)
    ]


def stored(
    values: Values,
    moments: Parts,
    keep: Tensor,
    plan: FusedPlan,
    key: Tensor | None,
    index: Tensor | None,
) -> tuple[Tensor, Parts]:
    """The values of `fused_update` in the formats of the parameter and of its `moments` before.

    `key` is that of `rounding_key`, `index` of `global_index`; None where nothing is rounded.
    """

    def draw(stream: str) -> Tensor:
        assert key is not None
        assert index is not None
        return uniform16(index, key, stream)

    param = to_bfloat16(values[0], draw("param")) if plan.rounds_param else values[0]
    result: list[tuple[Tensor, ...]] = []
    for before, name, kind, value in zip(moments, MOMENTS, plan.formats, values[1:], strict=False):
        if name == "exp_dev_sq" and not plan.gated:
            result.append(before)
        elif kind == "8bit":
            codes, scale = encode_blocks(value, name, draw(name))
            if plan.on_device:  # codes do not survive a round trip
                codes = torch.where(keep > 0, codes, before[0])
                scale = torch.where(keep > 0, scale, before[1])
            result.append((codes, scale))
        else:
            result.append((to_bfloat16(value, draw(name)) if kind == "bfloat16" else value,))
    return param, tuple(result)


def state_sums(
    moments: Parts,
    c: Scalars,
    plan: FusedPlan,
    lr: float | Tensor,
    shared: PooledGate | None = None,
) -> Tensor:
    """Columns of the gate statistics, from the states after a step."""
    exp_avg, exp_avg_sq, *noise = _loaded(moments, plan, c["keep"].dtype)
    direction = exp_avg / (exp_avg_sq.sqrt() / c["bias_correction2_sqrt"] + c["eps"])
    if not plan.gated:
        return ungated_sums(direction, lr)
    if shared is not None:
        return pooled_sums(shared, direction, lr)
    gate, mean_sq, spread = _gate(exp_avg, exp_avg_sq, noise, c, plan)
    # a step that is ungated yet counts as open, for alpha = 0 too
    spread = torch.where(c["blend"] > 0, spread, -1.0)
    mean_sq = torch.where(c["blend"] > 0, mean_sq, 1.0)
    return parameter_sums(mean_sq, spread, gate, direction, c["boundary"], lr)


def capturable_poprisk_adamw(
    work: GroupWork,
    options: GroupOptions,
    sums: list[Tensor] | None,
    keep: Tensor,
    grad_scale: Tensor | None,
) -> None:
    """Step of one group on its device, without a host sync; arguments as in `step_group`."""
    rows, counts = scalar_rows(options, work.steps, work.dev_steps, keep, grad_scale)
    row_of = rows.unbind()
    keys: tuple[Tensor, ...] | None = None
    for part in work.parts(lambda i: _likeness(work, i)):
        alike, plan = work.only(part), FusedPlan.of(options, work, part[0], on_device=True)
        if plan.rounds and keys is None:
            positions = positions_on(counts.device, work.positions)
            keys = rounding_key(counts, positions, options.rounding_seed).unbind()
        key = torch.stack([keys[i] for i in part]) if keys is not None else None
        _step_alike(alike, torch.stack([row_of[i] for i in part]), key, options, plan, sums)


def _likeness(work: GroupWork, index: int) -> Hashable:
    """Equal for parameters that one launch can take together."""
    param, owner = work.params[index], work.owners[index]
    formats = tuple(moment.kind for moment in work.moments(index))
    dtypes = param.dtype, work.grads[index].dtype, work.exp_avgs[index].tensors[0].dtype
    size = tuple(param.shape) if "8bit" in formats or work.pooled else param.numel()
    layout = None
    if is_dtensor(owner):
        layout = owner.shape, owner.device_mesh, owner.placements  # type: ignore[attr-defined]
    return param.device, dtypes, formats, size, layout


def _step_alike(
    work: GroupWork,
    rows: Tensor,
    key: Tensor | None,
    options: GroupOptions,
    plan: FusedPlan,
    sums: list[Tensor] | None,
) -> None:
    """Parameters of one size as the rows of one tensor."""
    first = work.params[0]
    if first.numel() == 0:
        return
    shape = plan.shape_of(first)
    ones = (1,) * len(shape)

    def together(tensors: list[Tensor], like: tuple[int, ...] = shape) -> Tensor:
        views = [tensor.reshape(like) for tensor in tensors]
        return views[0].unsqueeze(0) if len(views) == 1 else torch.stack(views)

    lists = [
        [[m.tensors[k] for m in moments] for k in range(len(moments[0].tensors))]
        for moments in (work.exp_avgs, work.exp_avg_sqs, work.exp_dev_sqs)
        if moments
    ]
    moments = tuple(
        (together(values), *(together(scale, tuple(scale[0].shape)) for scale in scales))
        for values, *scales in lists
    )
    is_wide = moments[0][0].dtype == torch.float64
    rows = rows.to(torch.float64 if is_wide else torch.float32)
    c = {name: row.view(-1, *ones) for name, row in zip(COLUMNS, rows.unbind(1), strict=True)}

    def restore(ungated: Tensor, gated: Tensor) -> Tensor:
        squares = [update.square().flatten(1).sum(1) for update in (ungated, gated)]
        total = sum_over_shards(torch.stack(squares), work.owners)
        return norm_restoring_scale(total[0], total[1]).view(-1, *ones)

    shared = None
    if work.pooled:
        gates = plan.gate_shape(shape[0])
        columns = zip(*work.pooled, strict=True)
        shared = PooledGate(*(together(list(column), gates) for column in columns))
        if not gates:  # of a whole tensor
            shared = PooledGate(*(column.view(-1, *ones) for column in shared))
    values = fused_update(
        together(work.params),
        together(work.grads),
        moments,
        c,
        plan,
        restore if options.preserve_norm else None,
        shared.gate if shared is not None else None,
    )
    index = None
    if plan.rounds:
        index = global_index(work.owners[0], first).reshape(shape)
        key = None if key is None else key.view(-1, *ones)
    param, parts = stored(values, moments, c["keep"], plan, key, index)
    _copy(work.params, param)
    for targets, part in zip(lists[: 3 if plan.gated else 2], parts, strict=False):
        for target, value in zip(targets, part, strict=True):
            _copy(target, value)
    if sums is not None:
        sums.append(state_sums(parts, c, plan, options.lr, shared=shared))


def _copy(targets: list[Tensor], rows: Tensor) -> None:
    torch._foreach_copy_(
        targets, [row.view(t.shape) for row, t in zip(rows.unbind(), targets, strict=True)]
    )

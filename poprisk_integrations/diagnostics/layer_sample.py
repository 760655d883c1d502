"""What gate and noise look like by layer, from a sample of PopRiskAdamW's states.

Nothing of it is computed in the step: the states before and after it are enough, on every path.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from poprisk_integrations.core.gate import gate_factor
from poprisk_integrations.core.noise import deviation_scale, ema_mean_variance, moments_noise
from poprisk_integrations.diagnostics.window_layout import sample_coordinates
from poprisk_integrations.distributed import is_dtensor, local_tensor
from poprisk_integrations.optim import PopRiskAdamW
from poprisk_integrations.optim._gate_stats import COLUMNS, gate_ratios, pooled_gate
from poprisk_integrations.optim._options import MOMENTS, GroupOptions, kept_moments, resolve_group
from poprisk_integrations.optim._scalars import step_scalars
from poprisk_integrations.optim._states import moment_of

__all__ = [
    "LAYER_STATISTICS",
    "MOST_GROUPS",
    "LayerNaming",
    "LayerSample",
    "check_per_layer",
    "layer_groups",
]

LAYER_STATISTICS = (
    "open_fraction",
    "mean_gate",
    "update_norm_ratio",
    "closed_zero_grad",
    "closed_noise",
)
# Per tensor: a share of 1/3 is known to 0.015 for a tensor, to 0.005 for a layer of nine.
SAMPLED_PER_TENSOR = 1024
LARGEST_WHOLE = 2048

_EXTRA = ("signal_sq", "noise_sq", "decrease", "has_gradient")
_WIDTH = len(COLUMNS) + len(_EXTRA)
_Alike = tuple[int, torch.device, float, float]  # group, device, step, deviations
_DECREASE, _HAS_GRADIENT = _WIDTH - 2, _WIDTH - 1


MOST_GROUPS = 30  # curves that a tracker still shows side by side
REST = "rest"

LayerNaming = bool | int | Callable[[str], str | None]

# What wrappers put into the names of parameters.
_WRAPPERS = re.compile(
    r"(^|(?<=\.))(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|"
    r"base_model\.model)\."
)


class _Part(NamedTuple):
    """What is looked at of a parameter's local shard."""

    row: int  # of its layer
    chosen: Tensor | None  # coordinates; None for all of them
    size: int  # how many these are
    weight: float  # coordinates over all ranks for which each of them stands


class LayerSample:
    """Samples the states around a step; sums by layer group, additive over ranks.

    With u = m_hat / (sqrt(v_hat) + eps), the ungated direction, over the sampled coordinates:
        signal_to_noise    = sum u^2 / sum noise(u) - 1
        noise(u)           = c_t * s_hat * (1 + beta1)/2 / (sqrt(v_hat) + eps)^2
        predicted_decrease = sum_k lr * q_k * u_k * g_k,   q and u of the step before, fresh g
    with c_t of `core.noise.ema_mean_variance`. `signal_to_noise` is 0 in expectation (and may be
    negative) where gradients are pure noise; for i.i.d. gradients the sums are unbiased once s
    has settled (some 1/(1 - rho) steps), their ratio nearly so for many coordinates. On drifting
    gradients s is biased up, the ratio down. `predicted_decrease` is what one more step like
    the last would take off the loss, to first order and weight decay aside: unbiased on data not
    seen before, gate or not, since the batch had no part in q and u; of one batch, hence noisy.
    Gradients are taken as they are when `before_step` is called: clipped ones make it smaller.

    Of a tensor above 2048 elements 1024 are looked at, in each shard its share, and weighted up;
    smaller ones are looked at whole.

    Example:
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = PopRiskAdamW(layer.parameters())
        >>> sample = LayerSample(optimizer, [("head.weight", layer.weight)], True)
        >>> for _ in range(2):
        ...     layer.weight.grad = torch.ones(1, 2)
        ...     _ = optimizer.step()
        >>> sample.after_step()
        >>> sorted(sample.metrics(sample.sums()))[0]
        'head/closed_noise'
    """

    def __init__(
        self,
        optimizer: PopRiskAdamW,
        names: Iterable[tuple[str, Tensor]] = (),
        per_layer: LayerNaming = False,
    ) -> None:
        self._optimizer = optimizer
        by_id = {id(param): name for name, param in names}
        group_of = layer_groups(by_id.values(), per_layer)
        self.groups = list(dict.fromkeys(group_of.values()))
        rows = {name: self.groups.index(group) for name, group in group_of.items()}
        # The last row is for parameters without a group: they count in the total.
        rest = len(self.groups)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        self._place = {
            id(p): (rows.get(by_id.get(id(p), ""), rest), position)
            for position, p in enumerate(params)
        }
        self._parts: dict[tuple[int, int], _Part] = {}  # by parameter and size of its shard
        self._device = next((local_tensor(p).device for p in params), torch.device("cpu"))
        self._pending: Tensor | None = None
        self._sums = self._empty(self._device)

    @torch.no_grad()
    def before_step(self, scale: float | Tensor = 1.0) -> None:
        """Hold the last step against the gradients of the step to come, times `scale`."""
        self._pending = self._sample(with_gradient=True)
        self._pending[:, _DECREASE] *= scale

    @torch.no_grad()
    def after_step(self) -> None:
        """Sample the step that was taken."""
        self._sums = self._sample(with_gradient=False)
        if self._pending is not None:
            self._sums[:, _DECREASE:] = self._pending[:, _DECREASE:]
            self._pending = None

    def sums(self) -> Tensor:
        """Shape (layer groups + 1, columns), to be averaged over ranks; zero before a sample."""
        return self._sums

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """Statistics of all parameters and, as `<layer group>/<name>`, of each group.

        From `sums()`, averaged over ranks; those that there are: no noise is known before the
        second step, nor in ungated groups.
        """
        host = sums.detach().double().cpu()
        total = host.sum(0)
        found = _signal_to_noise(total, "")
        if total[_HAS_GRADIENT] > 0 and bool(total[_DECREASE].isfinite()):
            found["predicted_decrease"] = float(total[_DECREASE])
        for name, row in zip(self.groups, host, strict=False):
            if row[0] > 0:
                ratios = gate_ratios(row[: len(COLUMNS)])
                found |= {f"{name}/{key}": float(ratios[key]) for key in LAYER_STATISTICS}
                found |= _signal_to_noise(row, f"{name}/")
        return found

    def _sample(self, *, with_gradient: bool) -> Tensor:
        sums = self._empty(self._device)
        for (index, _, step, dev_step), params in self._by_counts(with_gradient).items():
            options = resolve_group(self._optimizer.param_groups[index])
            sums += self._sums_of(params, options, step, dev_step, with_gradient).to(sums)
        return sums

    def _by_counts(self, with_gradient: bool) -> dict[_Alike, list[Tensor]]:
        """Parameters whose scalars are one number each; the device is read once."""
        found: list[tuple[int, Tensor]] = []
        counts: list[Tensor] = []
        for index, group in enumerate(self._optimizer.param_groups):
            for param in group["params"]:
                state = self._optimizer.state.get(param, {})
                has_noise = "dev_step" in state or "exp_dev_sq" not in kept_moments(group)
                is_due = "step" in state and has_noise
                if not is_due or (with_gradient and param.grad is None):
                    continue
                if local_tensor(param).numel():
                    found.append((index, param))
                    counts += [state["step"], state.get("dev_step", state["step"])]
        if not found:
            return {}
        flat = torch.stack([c.to(counts[0]) for c in counts]).tolist()
        result: dict[_Alike, list[Tensor]] = {}
        for (index, param), step, dev_step in zip(found, flat[::2], flat[1::2], strict=True):
            if step > 0:
                device = local_tensor(param).device
                result.setdefault((index, device, step, dev_step), []).append(param)
        return result

    def _sums_of(
        self,
        params: list[Tensor],
        options: GroupOptions,
        step: float,
        dev_step: float,
        with_gradient: bool,
    ) -> Tensor:
        kept = MOMENTS[:2] if options.from_moments else MOMENTS
        exp_avg, exp_avg_sq, *stored = (
            torch.cat([self._pick(p, self._moment(p, key)) for p in params]) for key in kept
        )
        has_moved = not options.from_pieces and (step > 1 or not options.centered)
        scalars = step_scalars(options, step, dev_step - has_moved)
        denom = (exp_avg_sq.sqrt() / scalars.bias_correction2_sqrt).add_(options.eps)
        direction = exp_avg / denom
        gate = torch.ones_like(exp_avg)
        is_open = torch.ones_like(exp_avg, dtype=torch.bool)
        mean_sq = exp_avg.square()
        pooled = [g for p in params if (g := pooled_gate(self._optimizer, p)) is not None]
        if options.from_moments:
            noise, noise_scale = moments_noise(exp_avg_sq, mean_sq, scalars.noise_scale), 1.0
        else:
            noise, noise_scale = stored[0], scalars.noise_scale
        is_dead: Tensor | None = None
        if options.pooled:
            if len(pooled) < len(params):
                return self._empty(exp_avg.device)  # resumed: no step here has made a gate yet
            gate, is_open, is_dead = (
                self._spread(params, column) for column in zip(*pooled, strict=True)
            )
            gate, is_open, is_dead = gate.to(exp_avg), is_open > 0, is_dead > 0
        elif scalars.gate_is_active:
            noise = mean_sq if scalars.noise_is_signal else noise
            gate = gate_factor(
                mean_sq,
                noise,
                gate=options.gate,
                alpha=options.alpha,
                lambda_pop=options.lambda_pop,
                eps=options.gate_eps * scalars.bias_correction1**2,
                noise_scale=noise_scale,
            )
            gate = options.gate_blend * gate + (1 - options.gate_blend)
            is_open = mean_sq > options.alpha * noise_scale * noise
        ones = torch.ones_like(exp_avg)
        columns: dict[str, Tensor] = {"numel": ones}
        if with_gradient:
            grad = torch.cat([self._pick(p, _real(p.grad)) for p in params]).to(exp_avg)
            sign = -1.0 if options.maximize else 1.0
            size = options.lr * (sign / scalars.bias_correction1)
            columns["decrease"] = gate * direction * grad * size
            columns["has_gradient"] = ones
        else:
            is_dead = ~is_open & (mean_sq == 0) if is_dead is None else is_dead
            columns |= {
                "open": is_open.to(exp_avg.dtype),
                "gate": gate,
                "ungated_sq": direction.square(),
                "gated_sq": (direction * gate).square(),
                "closed_zero_grad": is_dead.to(exp_avg.dtype),
                "closed_noise": (~is_open & ~is_dead).to(exp_avg.dtype),
                "lr_numel": ones * options.lr,
            }
            if options.gated and dev_step > 0 and not scalars.noise_is_signal:
                # of m as stored, hence the bias correction
                share = ema_mean_variance(options.beta1, int(step))
                if options.from_moments:  # s_hat is short of what m_hat takes of it
                    scale = share / (1 - share) if step > 1 else 0.0
                else:
                    scale = share / deviation_scale(options.beta1)
                    scale *= scalars.bias_correction1**2 / (1 - options.rho**dev_step)
                columns["signal_sq"] = direction.square()
                columns["noise_sq"] = noise * scale / denom.square()
        return self._summed(params, columns)

    def _summed(self, params: list[Tensor], columns: dict[str, Tensor]) -> Tensor:
        """Weighted sums by row; index_add takes one column at a time, which is what is fast."""
        sums = self._empty(columns["numel"].device)
        # Loops over parameters stay on the host.
        parts = [self._part(p) for p in params]
        sizes = torch.tensor([part.size for part in parts])
        weight = torch.tensor([part.weight for part in parts], dtype=sums.dtype)
        weight = weight.repeat_interleave(sizes).to(sums.device)
        rows = torch.tensor([part.row for part in parts])
        rows = rows.repeat_interleave(sizes).to(sums.device)
        for place, name in enumerate((*COLUMNS, *_EXTRA)):
            if name in columns:
                column = columns[name].to(sums.dtype) * weight
                sums[:, place] = torch.zeros_like(sums[:, 0]).index_add_(0, rows, column)
        return sums

    def _pick(self, param: Tensor, values: Tensor) -> Tensor:
        """The sampled coordinates of something of the parameter's local shape."""
        flat, chosen = values.reshape(-1), self._part(param).chosen
        picked = flat if chosen is None else flat.index_select(0, chosen)
        return picked if picked.dtype == torch.float64 else picked.float()

    def _spread(self, params: list[Tensor], shared: Iterable[Tensor]) -> Tensor:
        """Something of rows or tensors, at the sampled coordinates of the parameters."""
        pairs = zip(params, shared, strict=True)
        return torch.cat([self._pick(p, x.expand(_real(p).shape)) for p, x in pairs])

    def _moment(self, param: Tensor, key: str) -> Tensor:
        moment = moment_of(self._optimizer.state[param], key)
        return moment.read() if moment.kind == "8bit" else moment.tensors[0]

    def _part(self, param: Tensor) -> _Part:
        local, whole = _real(param), param.numel()
        numel = size = local.numel()
        key = id(param), numel
        if key not in self._parts:
            row, position = self._place.get(id(param), (len(self.groups), 0))
            if whole > LARGEST_WHOLE:
                size = max(1, min(numel, SAMPLED_PER_TENSOR * numel // whole))
            chosen = sample_coordinates(numel, size, position)
            chosen = None if chosen is None else chosen.to(local.device)
            self._parts[key] = _Part(row, chosen, size, numel * _shards(param) / size)
        return self._parts[key]

    def _empty(self, device: torch.device) -> Tensor:
        precise = torch.float32 if device.type == "mps" else torch.float64
        return torch.zeros(len(self.groups) + 1, _WIDTH, dtype=precise, device=device)


def layer_groups(names: Iterable[str], per_layer: LayerNaming = True) -> dict[str, str]:
    """The layer group of each parameter that is in one.

    True takes the first numbered block of a name ("model.layers.3"), else the module that holds
    the parameter ("model.embed_tokens", "lm_head"). Where that makes more than `MOST_GROUPS`,
    neighbouring blocks go together ("model.layers.0-3"), and then names are cut shorter.

    A number keeps so many parts of a name, at most all but the last; a function takes a name to its
    group, or to None for no group; False puts none in one. What FSDP, DDP, torch.compile and PEFT
    put into names is left out.

    Example:
        >>> layer_groups(["embed.weight", "layers.0.up.weight", "layers.0.up.bias", "bias"])
        {'embed.weight': 'embed', 'layers.0.up.weight': 'layers.0', 'layers.0.up.bias': 'layers.0', 'bias': 'bias'}
    """  # noqa: E501
    if per_layer is False:
        return {}
    clean = {name: _WRAPPERS.sub("", name) for name in names}
    if callable(per_layer):
        found = {name: per_layer(short) for name, short in clean.items()}
        return {name: str(group) for name, group in found.items() if group is not None}
    if per_layer is not True:
        return {name: _cut(short, per_layer) for name, short in clean.items()}
    groups = {name: _block(short) for name, short in clean.items()}
    width, longest = 1, max((_number(g) for g in groups.values()), default=0)
    while len(set(groups.values())) > MOST_GROUPS and width <= longest:
        width *= 2
        groups = {name: _block(short, width) for name, short in clean.items()}
    depth = max((g.count(".") for g in groups.values()), default=0)
    while len(set(groups.values())) > MOST_GROUPS and depth > 0:
        groups = {name: ".".join(group.split(".")[:depth]) for name, group in groups.items()}
        depth -= 1
    kept = list(dict.fromkeys(groups.values()))
    if len(kept) <= MOST_GROUPS:
        return groups
    kept = kept[: MOST_GROUPS - 1]
    return {name: group if group in kept else REST for name, group in groups.items()}


def check_per_layer(per_layer: LayerNaming) -> None:
    """Raise ValueError for what is neither a bool, an integer >= 1 nor callable."""
    is_depth = type(per_layer) is int and per_layer >= 1
    if not (isinstance(per_layer, bool) or is_depth or callable(per_layer)):
        raise ValueError(
            f"Invalid per_layer: {per_layer!r}. Must be True, False, an integer >= 1 (parts of a "
            "parameter's name) or a function from a name to its group."
        )


def _cut(name: str, depth: int) -> str:
    parts = name.split(".")
    return ".".join(parts[: min(depth, max(1, len(parts) - 1))])


def _block(name: str, width: int = 1) -> str:
    """Up to the first number, or the module; `width` blocks share one name."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts[:-1]) if part.isdecimal()), None)
    if at is None:
        return _cut(name, len(parts))
    start = int(parts[at]) // width * width
    number = parts[at] if width == 1 else f"{start}-{start + width - 1}"
    return ".".join([*parts[:at], number])


def _number(group: str) -> int:
    last = group.rsplit(".", 1)[-1]
    return int(last) if last.isdecimal() else 0


def _signal_to_noise(row: Tensor, prefix: str) -> dict[str, float]:
    signal, noise = (float(row[len(COLUMNS) + i]) for i in (0, 1))
    return {f"{prefix}signal_to_noise": signal / noise - 1} if noise > 0 else {}


def _real(tensor: Any) -> Tensor:
    tensor = local_tensor(tensor).detach()
    return torch.view_as_real(tensor) if torch.is_complex(tensor) else tensor


def _shards(param: Tensor) -> int:
    """Shards of the parameter: the mean over ranks, times it, is the sum over the shards."""
    if is_dtensor(param):
        mesh, shards = param.device_mesh, 1  # type: ignore[attr-defined]
        for dim, placement in enumerate(param.placements):  # type: ignore[attr-defined]
            # a strided shard, which has a dimension too, says no to is_shard()
            shards *= mesh.size(dim) if hasattr(placement, "dim") else 1
        return shards
    if getattr(param, "_fsdp_flattened", False):  # of FSDP1, whose shards are plain tensors
        return dist.get_world_size()
    return 1

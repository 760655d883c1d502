"""What gate and noise look like by layer, from a sample of PopRiskAdamW's states.

Nothing of it is computed in the step: the states before and after it are enough, on every path.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from poprisk_integrations.core.gate import gate_factor
from poprisk_integrations.core.noise import deviation_scale, ema_mean_variance
from poprisk_integrations.diagnostics.coordinate_sample import sample_coordinates
from poprisk_integrations.diagnostics.layer_groups import LayerNaming, layer_groups
from poprisk_integrations.distributed import is_dtensor, local_tensor
from poprisk_integrations.optim import PopRiskAdamW
from poprisk_integrations.optim._gate_stats import COLUMNS, gate_ratios
from poprisk_integrations.optim._moments import MOMENTS, moment_of
from poprisk_integrations.optim._options import GroupOptions, resolve_group, step_scalars

__all__ = ["LAYER_STATISTICS", "LayerSample"]

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
    seen before, gate or not, since the batch had no part in q and u
    (`core.risk.lagged_risk_decrease`); of one batch, hence noisy. Gradients are taken as they
    are when `before_step` is called: clipped ones make it smaller.

    Of a tensor above 2048 elements 1024 are looked at, in each shard its share, and weighted up;
    smaller ones are looked at whole.

    Args:
        optimizer: Whose states.
        names: (name, parameter) of the model.
        per_layer: See `layer_groups`.

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
        self._row_of = {id(p): rows.get(by_id.get(id(p), ""), rest) for p in params}
        self._position = {id(p): position for position, p in enumerate(params)}
        self._chosen: dict[tuple[int, int], Tensor | None] = {}
        self._pending: Tensor | None = None
        self._sums: Tensor | None = None

    @torch.no_grad()
    def before_step(self) -> None:
        """Hold the last step against the gradients of the step to come."""
        self._pending = self._sample(with_gradient=True)

    @torch.no_grad()
    def after_step(self) -> None:
        """Sample the step that was taken."""
        sums = self._sample(with_gradient=False)
        if self._pending is not None:
            sums[:, _DECREASE:] = self._pending[:, _DECREASE:]
            self._pending = None
        self._sums = sums

    def sums(self) -> Tensor:
        """Shape (layer groups + 1, columns), to be averaged over ranks; zero before a sample."""
        if self._sums is None:
            self._sums = self._empty(self._device())
        return self._sums

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """Statistics of all parameters and, as `<layer group>/<name>`, of each group.

        Args:
            sums: `sums()`, averaged over ranks.

        Returns:
            Those that there are: no noise is known before the second step, nor in ungated groups.
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
        sums = self._empty(self._device())
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
                if "dev_step" not in state or (with_gradient and param.grad is None):
                    continue
                if local_tensor(param).numel():
                    found.append((index, param))
                    counts += [state["step"], state["dev_step"]]
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
        exp_avg, exp_avg_sq, exp_dev_sq = (
            torch.cat([self._pick(p, self._moment(p, key)) for p in params]) for key in MOMENTS
        )
        has_moved = not options.from_pieces and (step > 1 or not options.centered)
        scalars = step_scalars(options, step, dev_step - has_moved)
        denom = (exp_avg_sq.sqrt() / scalars.bias_correction2_sqrt).add_(options.eps)
        direction = exp_avg / denom
        gate = torch.ones_like(exp_avg)
        is_open = torch.ones_like(exp_avg, dtype=torch.bool)
        mean_sq = exp_avg.square()
        if scalars.gate_is_active:
            noise = mean_sq if scalars.noise_is_signal else exp_dev_sq
            gate = gate_factor(
                mean_sq,
                noise,
                gate=options.gate,
                alpha=options.alpha,
                lambda_pop=options.lambda_pop,
                eps=options.gate_eps * scalars.bias_correction1**2,
                noise_scale=scalars.noise_scale,
            )
            gate = options.gate_blend * gate + (1 - options.gate_blend)
            is_open = mean_sq > options.alpha * scalars.noise_scale * noise
        ones = torch.ones_like(exp_avg)
        columns: dict[str, Tensor] = {"numel": ones}
        if with_gradient:
            grad = torch.cat([self._pick(p, _real(p.grad)) for p in params]).to(exp_avg)
            sign = -1.0 if options.maximize else 1.0
            size = options.lr * (sign / scalars.bias_correction1)
            columns["decrease"] = gate * direction * grad * size
            columns["has_gradient"] = ones
        else:
            is_dead = ~is_open & (mean_sq == 0)
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
                share = ema_mean_variance(options.beta1, int(step)) / deviation_scale(options.beta1)
                scale = share * scalars.bias_correction1**2 / (1 - options.rho**dev_step)
                columns["signal_sq"] = direction.square()
                columns["noise_sq"] = exp_dev_sq * scale / denom.square()
        return self._summed(params, columns)

    def _summed(self, params: list[Tensor], columns: dict[str, Tensor]) -> Tensor:
        """Weighted sums by row; index_add takes one column at a time, which is what is fast."""
        device = columns["numel"].device
        # Loops over parameters stay on the host.
        sizes = torch.tensor([self._count(p) for p in params])
        weights = [_real(p).numel() * _shards(p) / self._count(p) for p in params]
        precise = torch.float32 if device.type == "mps" else torch.float64
        weight = torch.tensor(weights, dtype=precise).repeat_interleave(sizes).to(device)
        rows = torch.tensor([self._row_of.get(id(p), len(self.groups)) for p in params])
        rows = rows.repeat_interleave(sizes).to(device)
        sums = self._empty(device)
        for place, name in enumerate((*COLUMNS, *_EXTRA)):
            if name in columns:
                column = columns[name].to(precise) * weight
                sums[:, place] = torch.zeros_like(sums[:, 0]).index_add_(0, rows, column)
        return sums

    def _pick(self, param: Tensor, values: Tensor) -> Tensor:
        """The sampled coordinates of something of the parameter's local shape."""
        flat = values.reshape(-1)
        chosen = self._indices(param)
        picked = flat if chosen is None else flat.index_select(0, chosen)
        return picked if picked.dtype == torch.float64 else picked.float()

    def _moment(self, param: Tensor, key: str) -> Tensor:
        moment = moment_of(self._optimizer.state[param], key)
        return moment.read() if moment.kind == "8bit" else moment.tensors[0]

    def _indices(self, param: Tensor) -> Tensor | None:
        numel = _real(param).numel()
        key = id(param), numel
        if key not in self._chosen:
            chosen = sample_coordinates(numel, self._count(param), self._position.get(id(param), 0))
            device = local_tensor(param).device
            self._chosen[key] = None if chosen is None else chosen.to(device)
        return self._chosen[key]

    def _count(self, param: Tensor) -> int:
        local, whole = _real(param).numel(), param.numel()
        if whole <= LARGEST_WHOLE:
            return local
        return max(1, min(local, SAMPLED_PER_TENSOR * local // whole))

    def _empty(self, device: torch.device) -> Tensor:
        precise = torch.float32 if device.type == "mps" else torch.float64
        return torch.zeros(len(self.groups) + 1, _WIDTH, dtype=precise, device=device)

    def _device(self) -> torch.device:
        params = (p for group in self._optimizer.param_groups for p in group["params"])
        return next((local_tensor(p).device for p in params), torch.device("cpu"))


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
            shards *= mesh.size(dim) if placement.is_shard() else 1
        return shards
    if getattr(param, "_fsdp_flattened", False):  # of FSDP1, whose shards are plain tensors
        return dist.get_world_size()
    return 1

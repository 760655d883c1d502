"""Batch gradients under DeepSpeed, which shows none, from the first moments of an Adam."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from poprisk_integrations.diagnostics import GradientWindow
from poprisk_integrations.diagnostics.window_layout import CoordinateSample, FlatVector

__all__ = ["DeepSpeedGradients"]

_MOMENT = "exp_avg"
_SECOND_MOMENTS = ("exp_avg_sq", "exp_inf", "exp_avg_var")


class DeepSpeedGradients:
    """Reads ZeRO's partitions of the optimizer's state after each step of the engine.

        m_t = beta1 m_{t-1} + (1 - beta1) g_t   <=>   g_t = (m_t - beta1 m_{t-1}) / (1 - beta1)
    at the sampled coordinates, the only ones of which m_{t-1} is kept. Any optimizer with an fp32
    `exp_avg` and a second moment beside it will do; an Adam whose weight decay is not decoupled
    adds `weight_decay * w` to g_t, the same at each batch. Raises ValueError where gradients cannot
    be recovered.
    """

    @torch.no_grad()
    def __init__(self, optimizer: Any, model: nn.Module, device: torch.device) -> None:
        self._wrapper = optimizer
        self._zero = getattr(optimizer, "optimizer", optimizer)
        self._params = [p for p in model.parameters() if p.requires_grad]
        self._check()
        # What the engine clips in its step is clipped in g_t; its own global norm undoes that.
        self.max_norm = float(getattr(self._zero, "clip_grad", 0.0) or 0.0)
        self._group = getattr(self._zero, "dp_process_group", None)
        numels = [int(getattr(p, "ds_numel", p.numel())) for p in self._params]
        self._numel = torch.tensor(numels, dtype=torch.float64)
        weights = [self._fragment(p, None) for p in self._params]
        self._sample = CoordinateSample(weights, numels)
        shapes = [torch.Size([count]) for count in self._sample.counts]
        # On the device where ranks communicate; the weights are those from before the step, which
        # `GradientWindow` asks for.
        vectors = [FlatVector(self._sample.counts, shapes, device) for _ in range(4)]
        self._weights, self._moments, self._now, self._grads = vectors
        self._host = self._sample.zeros()
        self._read(self._weights, None)
        # Before the first step there is no state, and m = 0.
        self._is_checked = any(self._zero.state.values())
        if self._is_checked:
            self._check_state()
            self._read(self._moments, _MOMENT)

    def window(self, steps: int, epoch_steps: int | None) -> GradientWindow:
        """A window of the sampled coordinates, weighted by the sizes of the whole tensors."""
        return GradientWindow(
            steps,
            accumulator="sample",
            shard_group=self._group,
            epoch_steps=epoch_steps,
            numel=self._numel,
        )

    def norm_before_clipping(self) -> float | Tensor | None:
        """Global norm of the gradients of the last step; None if the engine does not say."""
        return getattr(self._zero, "_global_grad_norm", None)

    @torch.no_grad()
    def add_to(self, window: GradientWindow, scale: float | Tensor) -> None:
        """Add the step that the engine has just made; a skipped one as not finite."""
        if self._wrapper.step_was_skipped:
            window.add(self._weights.parts, grads=self._grads.parts, scale=math.nan)
            return
        if not self._is_checked:
            self._is_checked = True
            self._check_state()
        beta = float(self._zero.param_groups[0]["betas"][0])
        self._read(self._now, _MOMENT)
        torch.sub(self._now.flat, self._moments.flat, alpha=beta, out=self._grads.flat)
        self._grads.flat.div_(1.0 - beta)
        window.add(self._weights.parts, grads=self._grads.parts, scale=scale)
        self._moments, self._now = self._now, self._moments
        self._read(self._weights, None)

    def _read(self, out: FlatVector, key: str | None) -> None:
        fragments = [self._fragment(p, key) for p in self._params]
        self._sample.read(fragments, self._host)
        out.flat.copy_(self._host.flat)

    def _fragment(self, param: Any, key: str | None) -> Tensor:
        """This rank's part of a parameter's fp32 weights, or of a state of it; 1-dim."""
        fragment: Tensor
        if hasattr(param, "ds_id"):  # ZeRO-3
            from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

            if key is None:
                fragment = safe_get_local_fp32_param(param)
            else:
                fragment = safe_get_local_optimizer_state(param, key)
            return _without_padding(fragment.reshape(-1), param)
        mapping = getattr(param, "_hp_mapping", None)
        if mapping is not None and key is None:  # ZeRO-1, ZeRO-2
            fragment = mapping.get_hp_fragment()
        elif mapping is not None:
            # Not the mapping's own state: DeepSpeed links it after the step of the first group,
            # when the other groups have none yet.
            (flat,) = self._zero.param_groups[mapping.param_group_index]["params"]
            address = mapping.get_hp_fragment_address()
            fragment = self._zero.state[flat][key].narrow(0, address.start, address.numel)
        elif self._is_partitioned:  # all of it lies on other ranks
            fragment = torch.empty(0, device=param.device)
        elif key is None:
            fragment = param.detach()
        else:
            fragment = self._zero.state.get(param, {}).get(key, torch.zeros_like(param))
        return fragment.reshape(-1)

    @property
    def _is_partitioned(self) -> bool:
        return any(hasattr(p, "_hp_mapping") for p in self._params)

    def _check(self) -> None:
        if not self._params:
            raise ValueError("The model has no parameter that requires a gradient.")
        zero = self._zero
        for name, mode in (
            ("swap_optimizer", "an optimizer offloaded to NVMe"),
            ("zenflow", "zenflow"),
            ("has_moe_layers", "mixture-of-experts groups"),
        ):
            if getattr(zero, name, False):
                raise _unreadable(f"{mode} keeps its state where it cannot be read at every step")
        is_zero = self._is_partitioned or any(hasattr(p, "ds_id") for p in self._params)
        owned = {id(p) for group in zero.param_groups for p in group["params"]}
        if not is_zero and not owned >= {id(p) for p in self._params}:
            raise _unreadable(f"{type(zero).__name__} does not link parameters to their state")
        betas = [group.get("betas") for group in zero.param_groups]
        if None in betas or len({float(pair[0]) for pair in betas}) != 1:
            raise self._no_adam()

    def _check_state(self) -> None:
        for state in filter(None, self._zero.state.values()):
            if not _is_fp32(state.get(_MOMENT)) or not any(k in state for k in _SECOND_MOMENTS):
                raise self._no_adam()

    def _no_adam(self) -> ValueError:
        name = type(getattr(self._zero, "optimizer", self._zero)).__name__
        return _unreadable(
            f"{name} has no Adam's state in fp32 ('exp_avg' and 'exp_avg_sq', one beta1)"
        )


def _without_padding(shard: Tensor, param: Any) -> Tensor:
    """ZeRO-3's shards have one size; the last ones end in padding."""
    rank = torch.distributed.get_rank(group=param.ds_process_group)
    left = int(param.ds_numel) - rank * shard.numel()
    return shard[: max(0, min(left, shard.numel()))]


def _is_fp32(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float32


def _unreadable(why: str) -> ValueError:
    return ValueError(
        "The stop and the learning-rate cut cannot run under this DeepSpeed configuration: it "
        f"shows no gradients, and {why}. Use ZeRO 1, 2 or 3 with an Adam, DDP or FSDP."
    )

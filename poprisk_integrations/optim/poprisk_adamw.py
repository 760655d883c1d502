"""AdamW whose update passes only where the batch signal beats its noise."""

import logging
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import Optimizer, ParamsT
from typing_extensions import Self

from poprisk_integrations.distributed import local_tensor
from poprisk_integrations.optim._checkpoint import loading
from poprisk_integrations.optim._cpu import all_finite
from poprisk_integrations.optim._gate_stats import StepRecord, named_ratios
from poprisk_integrations.optim._noise_source import NoiseSource
from poprisk_integrations.optim._options import (
    DEFAULTS,
    GroupOptions,
    check_gradients,
    check_group,
    check_params,
    check_published,
    idle_options,
    needs_device_step,
    resolve_group,
)
from poprisk_integrations.optim._paths import path_of, paths_now, step_group
from poprisk_integrations.optim._pooled import check_grain, pool_gates
from poprisk_integrations.optim._states import fit_state
from poprisk_integrations.optim._work import GroupWork, verdict

__all__ = ["PopRiskAdamW"]

logger = logging.getLogger("poprisk_integrations")
IDLE_STEPS = 10
_IDLE = (
    "PopRiskAdamW has made %d steps and found no gradient in any: it trains nothing. Were the "
    "model's parameters replaced after the optimizer was made (load_state_dict(assign=True), "
    "to_empty() of a meta model, a wrapper)? Make it after them."
)
_IDLE_OPTION = (
    "PopRiskAdamW(%s) does nothing with noise_source='moments', the default, which keeps no "
    "average of the noise. noise_source='temporal' does."
)


class PopRiskAdamW(Optimizer):
    """AdamW with a gate on each coordinate: update it only where its signal beats its noise.

    Soft gate of arXiv:2605.01172 (eq. 242), per coordinate; hats are bias-corrected:
        m_t = beta1 * m_{t-1} + (1 - beta1) * g_t
        v_t = beta2 * v_{t-1} + (1 - beta2) * g_t^2
        s_hat = max(v_hat - m_hat^2, 0)
        d   = max(m_hat^2 - alpha * s_hat, 0),   q = d / (d + lambda_pop * s_hat)
        p_t = p_{t-1} - lr * weight_decay * p_{t-1} - lr * q * m_hat / (sqrt(v_hat) + eps)
    The paper keeps an average of its own for the noise, noise_source="temporal":
        s_t = rho * s_{t-1} + (1 - rho) * (g_t - m_hat_{t-1})^2
    The published rule to the letter is `PopRiskAdamW.paper(...)`. The defaults differ from it in
    three points: the noise is read off AdamW's moments, so states are AdamW's; alpha is calibrated
    (alpha=1 is a 4.5-sigma test of an EMA); and the gate has no absolute eps, so it does not depend
    on the scale of the loss.

    g is the gradient of the batch MEAN as it reaches the optimizer (averaged over micro-batches
    and ranks, clipped if the trainer clips); s estimates the variance of that mean.

    Args:
        params: Parameters, named parameters or parameter groups. Every option below may stand in
            a group, e.g. `{"params": router, "gate": "none"}`.
        lr: Learning rate; a 1-element tensor is allowed.
        betas: Decay of the first and second moment, each in [0, 1).
        eps: Added to sqrt(v_hat), as in AdamW.
        weight_decay: Decoupled and ungated; see `gate_decay`.
        gate: "soft", "hard" (1 where open, else 0), "snr" (never quite closed) or "none" (AdamW).
            "soft": of the three shapes the one that lost on no study that the defaults were
            chosen on (`recipes/benchmarks/default_gate`, for this and the reasons below).
        alpha: The gate opens where m_hat^2 > alpha * s_hat. A number, "calibrated", "fresh" (1)
            or "finite" (b/(n-b), the paper's finite-data boundary).
        false_open_rate: Share of pure-noise coordinates that pass; for alpha="calibrated". The
            default puts the boundary at the variance of m_hat itself: alpha = (1 - beta1)/2. It
            is level with tuned AdamW or above on sparse regression, noisy labels and small text
            models; over a 33x range of rates better on the first two, level on the last, where
            0.05 costs 1 to 3 %. 0.05 is the more robust where labels are wrong and rates may be too
            large, and the default of `PopRiskDPOConfig`.
        lambda_pop: Shrinkage beyond the boundary; None for the gate's own (soft: alpha, which
            gives q = max(0, 1 - alpha * s_hat / m_hat^2); snr: 1).
        rho: Decay of the noise variance, in [0, 1); of the sources that keep one. 0.999 gains 6 %
            on sparse regression and nothing on noisy labels or a small language model: 0.99, as
            the worst study decides.
        gate_warmup: Steps that stay ungated while the noise is measured. 0: a hundred cost the
            small language model 10 %, whose first steps the gate keeps short.
        gate_blend: w in [0, 1]; the update uses w * q + (1 - w). 0.5 gains less in each study; it
            is the remedy where a gate starves a router or rare rows (`where_it_hurts`).
        preserve_norm: Rescale each tensor's gated update to the norm of the ungated one. Off: on,
            it costs the small language model 4 % at its best rate.
        batch_size: Global batch size b, for alpha="finite".
        dataset_size: Number of training examples n, for alpha="finite".
        maximize: Maximise the objective.
        foreach: True for horizontally fused kernels on CPU (slower there than one tensor at a
            time). On accelerators all paths are.
        fused: True for one pass over memory per step: by a C++ kernel on CPU (compiled in a few
            seconds, once, announced in the log; needs a C++ compiler, else a warning and the eager
            path). None, with `foreach=None`, takes the fastest path that works: on CPU fused from
            a million elements on; see `path`. False never fuses.
        capturable: Keep step counts on the device, as accelerators always do.
        state_dtype: None for float32 states whatever the parameter (float64 and complex parameters
            keep their own dtype), "bfloat16" (stochastically rounded), "8bit" (experimental: codes
            in row blocks of 64 with float32 scales, for matrices of at least 4096 elements), or a
            dict from "exp_avg", "exp_avg_sq", "exp_dev_sq" to one of these.
        differentiable: Only False.
        gate_decay: Gate the weight decay too. Off: level or worse in each study it was chosen on,
            and slower to generalise in `recipes/benchmarks/grokking`; at large rates times decay it
            keeps a model whose coordinates are mostly closed from shrinking to nothing.
        noise_source: What s is measured from. "moments": v_hat - m_hat^2, floored at 0; better
            than the paper's on sparse signals, within 1 % elsewhere (`default_gate`), and without
            a third state.
            "temporal": deviations from the mean over steps, as in the paper. "microbatch": the
            spread of the backward passes of each step (2 or more). "ranks": the spread of the
            gradients of 2 or more DDP ranks. Same scale; see optim/README.md.
        granularity: What one gate decides about: "coordinate", "row" (of dimension 0) or
            "tensor". Of a row or tensor m_hat^2 and s_hat are averaged before the gate.
        stochastic_rounding: Round bfloat16 parameters stochastically (unbiased, reproducible).
            Low-precision states always are.
        rounding_seed: Seed of all stochastic rounding.
        skip_nonfinite: Skip steps with a non-finite gradient, for one more read of the gradients.
            False leaves that to others, as AdamW does: NaN spreads.
        collect_stats_every: Sample `gate_stats()` on every k-th step; 0 for never.
        published: `gate_eps` and `noise_mean` of `paper()`; here they warn, and will go.

    Raises:
        ValueError: If an option has a value that it cannot have.

    Example:
        >>> layer = torch.nn.Linear(4, 1)
        >>> optimizer = PopRiskAdamW(layer.parameters(), lr=1e-2)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     layer(torch.ones(8, 4)).square().mean().backward()
        ...     _ = optimizer.step()
        >>> sorted(optimizer.state[layer.weight])
        ['exp_avg', 'exp_avg_sq', 'step']
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = GroupOptions.lr,
        betas: tuple[float, float] = GroupOptions.betas,
        eps: float = GroupOptions.eps,
        weight_decay: float = GroupOptions.weight_decay,
        *,
        gate: str = GroupOptions.gate,
        alpha: float | str = GroupOptions.alpha,
        false_open_rate: float = GroupOptions.false_open_rate,
        lambda_pop: float | None = GroupOptions.lambda_pop,
        rho: float = GroupOptions.rho,
        gate_warmup: int = GroupOptions.gate_warmup,
        gate_blend: float = GroupOptions.gate_blend,
        preserve_norm: bool = GroupOptions.preserve_norm,
        batch_size: int | None = GroupOptions.batch_size,
        dataset_size: int | None = GroupOptions.dataset_size,
        maximize: bool = GroupOptions.maximize,
        foreach: bool | None = GroupOptions.foreach,
        fused: bool | None = GroupOptions.fused,
        capturable: bool = GroupOptions.capturable,
        state_dtype: str | dict[str, str] | None = GroupOptions.state_dtype,
        differentiable: bool = False,
        gate_decay: bool = GroupOptions.gate_decay,
        noise_source: str = GroupOptions.noise_source,
        granularity: str = GroupOptions.granularity,
        stochastic_rounding: bool = GroupOptions.stochastic_rounding,
        rounding_seed: int = GroupOptions.rounding_seed,
        skip_nonfinite: bool = GroupOptions.skip_nonfinite,
        collect_stats_every: int = GroupOptions.collect_stats_every,
        **published: Any,
    ) -> None:
        given = {**locals(), **published}
        defaults = {name: given.get(name, default) for name, default in DEFAULTS.items()}
        if defaults["noise_mean"] == "raw" and noise_source == GroupOptions.noise_source:
            defaults["noise_source"] = "temporal"  # the one that takes it; deprecated
        check_group({**defaults, "differentiable": differentiable})
        check_published(published)
        super().__init__(params, defaults)
        for option in dict.fromkeys(o for group in self.param_groups for o in idle_options(group)):
            logger.warning(_IDLE_OPTION, option)

    @classmethod
    def paper(cls, params: ParamsT, lr: float | Tensor = 1e-3, **options: Any) -> Self:
        """Algorithm 1 of arXiv:2605.01172 to the letter.

        gate="soft", alpha=1, lambda_pop=0, deviations from the uncorrected m_{t-1}, no warm-up,
        gate eps 1e-12 (the paper's own value is not known). At t = 1, where s_hat equals m_hat^2
        by algebra, s_hat is set to m_hat^2: rounding must not decide, so q = 0 and the first
        step only decays.

        Args:
            params: As in the constructor.
            lr: Learning rate.
            options: Any other constructor option; one given here wins over the published value.
                Also `gate_eps`, the constant in the gate's denominator on the scale of squared
                gradients, and `noise_mean`, "raw" or "bias_corrected": the mean that deviations
                are taken from.

        Example:
            >>> p = torch.nn.Parameter(torch.ones(2))
            >>> PopRiskAdamW.paper([p], lr=1e-3).param_groups[0]["alpha"]
            1.0
        """
        published: dict[str, Any] = {
            "gate": "soft",
            "alpha": 1.0,
            "lambda_pop": 0.0,
            "gate_eps": 1e-12,
            "noise_mean": "raw",
            "noise_source": "temporal",
        }
        chosen = {**published, **options}
        # as asked for: the constructor changes the source where it finds raw means
        check_group({**DEFAULTS, **chosen})
        return cls(params, lr, **chosen)

    @_disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its options are checked before anything changes.

        Raises:
            ValueError: If an option has a value that it cannot have, or a parameter a dtype or
                device.
        """
        check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        try:
            check_params(self.param_groups[-1]["params"])
            check_grain(self.param_groups[-1])
            self._noise_source.watch(self.param_groups)
        except ValueError:
            self.param_groups.pop()
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Options newer than a pickle take the constructor's defaults. Only our own: torch keeps
        # other names in `defaults`, which groups never had.
        for name, value in DEFAULTS.items():
            self.defaults.setdefault(name, value)
            for group in self.param_groups:
                group.setdefault(name, self.defaults[name])
        if "defaults" in state:  # a copy or a pickle; `load_state_dict` brings none
            self._noise_source.watch(self.param_groups)

    @_disable_dynamo
    @torch.inference_mode(False)
    def init_state(self) -> None:
        """Create all states (zeros, step 0) without a step.

        For checkpoint templates, and before a CUDA graph captures the first step.
        """
        for group in self.param_groups:
            for param in group["params"]:
                if param.requires_grad:
                    fit_state(self.state[param], param, group)
                    self._record.skipped_on(local_tensor(param).device)

    @property
    def path(self) -> str:
        """Which implementation `step()` runs.

        "fused_triton", "fused_compiled", "capturable" (eager, scalars on the device), "foreach" or
        "single_tensor" (eager, scalars on the host). Groups on different paths are joined by "+".
        """
        paths = {path_of(group) for group in self.param_groups if group["params"]}
        return "+".join(sorted(paths))

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether `step` unscales for GradScaler: as in torch, only where fused was asked for.

        Lightning refuses gradient clipping with it.
        """
        groups = [g for g in self.param_groups if g["params"]]
        return bool(groups) and all(g["fused"] and path_of(g).startswith("fused") for g in groups)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step.

        Inside `torch.compile` it runs as it does outside: the closure is compiled, the update is
        a graph break. Its fast paths are compiled already, and Dynamo would lose what it creates.

        A non-finite gradient anywhere (in any shard of a DTensor) skips the whole step: neither
        parameters nor states change, and the skip is counted. On accelerators this is decided on
        the device, without waiting for it. Gradients are never written.

        Args:
            closure: Re-evaluates the model and returns the loss.

        Raises:
            RuntimeError: If a gradient is sparse, a parameter was made float16 or resized without
                its moments, or a `noise_source` lacks its pieces.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    # Tensors that Dynamo traces or inference mode makes are of no use to later steps.
    @_disable_dynamo
    @torch.inference_mode(False)
    @torch.no_grad()
    def _update(self) -> None:
        check_gradients(self.param_groups)
        self._noise_source.check(self.param_groups, is_fresh=not self.state)
        works = [self._gather(index, group) for index, group in enumerate(self.param_groups)]
        # GradScaler hands these over where `_step_supports_amp_scaling`.
        found_inf = getattr(self, "found_inf", None)
        grad_scale = getattr(self, "grad_scale", None)
        checked = [group["skip_nonfinite"] for group in self.param_groups]
        paths = paths_now(self.param_groups)
        look = all_finite if "fused_compiled" in paths else None
        keep = verdict(works, checked, found_inf, look)
        self._noise_source.update(works, self.param_groups, keep, grad_scale)
        record = self._record
        if keep is None:
            record.idle += 1
            if record.idle == IDLE_STEPS and record.skipped is None:
                logger.warning(_IDLE, record.idle)
            return
        # In place, so that a captured graph counts at each replay.
        record.pooled = pool_gates(works, self.param_groups, keep, grad_scale)
        skipped = record.skipped_on(keep.device)
        skipped += (1.0 - keep).to(skipped.device)
        for index, (work, group) in enumerate(zip(works, self.param_groups, strict=True)):
            if not work.owners:
                continue
            # `keep` is on the CPU here unless one model is split over CPU and accelerator.
            if not needs_device_step(work.owners[0], group) and not keep:
                continue
            is_sampled = record.is_sampled(index, group["collect_stats_every"])
            sums: list[Tensor] | None = [] if is_sampled else None
            step_group(paths[index], work, resolve_group(group), sums, keep, grad_scale)
            if sums:
                record.samples[index] = torch.stack([s.to(sums[0]) for s in sums]).sum(0)

    @_disable_dynamo
    def gate_sums(self) -> Tensor:
        """Sums and counts of the last sampled step, ready to be added over ranks.

        Returns:
            Float tensor of shape (groups, 10): the columns of `gate_stats`'s sums, then the
            number of skipped steps and 1 (a count of ranks). Rows of groups that were not
            sampled are zero. Nothing is read from the device.
        """
        return self._record.sums(len(self.param_groups))

    @_disable_dynamo
    def gate_stats(self, sums: Tensor | None = None) -> dict[str, Tensor]:
        """What the gate did at the last sampled step (see `collect_stats_every`).

        open_fraction, mean_gate (q), update_norm_ratio (|gated| / |ungated| update, over all
        coordinates), closed_zero_grad and closed_noise (shares of coordinates closed because
        they have no gradient, or too noisy a one), effective_lr (lr * update_norm_ratio) and
        skipped_nonfinite (steps). Totals have these names, groups the prefix "group0/", ...

        Args:
            sums: `gate_sums()` added over ranks; None for this rank's own.

        Returns:
            0-dim CPU tensors; empty before the first sampled step. One device sync.
        """
        if not self._record.samples:
            return {}
        return named_ratios(self.gate_sums() if sums is None else sums)

    @property
    def skipped_nonfinite(self) -> int:
        """Steps skipped for a non-finite gradient in this process (reads the device)."""
        skipped = self._record.skipped
        return 0 if skipped is None else int(skipped)

    @_disable_dynamo
    @torch.inference_mode(False)
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load our own state or an Adam/AdamW one.

        States keep float32 (torch would cast them to the parameter's dtype). A noise variance that
        the state lacks, as AdamW's does, starts at the next step, with its own count. Options that
        the checkpoint lacks, how the step is computed (foreach, fused, capturable) and where the
        noise comes from stay as they are now; another noise source in the checkpoint is reported.

        Args:
            state_dict: As returned by `state_dict()`.

        Raises:
            ValueError: If it is another optimizer's state, its shapes do not fit or an option has a
                value that it cannot have. Nothing is loaded then.
        """
        with loading(self):
            super().load_state_dict(state_dict)
        self._noise_source.watch(self.param_groups)

    def _gather(self, group_index: int, group: dict[str, Any]) -> GroupWork:
        first = sum(len(g["params"]) for g in self.param_groups[:group_index])
        return GroupWork.of(group, first, self.state)

    # Neither is checkpointed, and copies make their own: hooks belong to the parameters of this
    # process, and sampling is not part of the trajectory.
    @property
    def _noise_source(self) -> NoiseSource:
        source = self.__dict__.get("_poprisk_noise_source")
        if source is None:
            source = self.__dict__["_poprisk_noise_source"] = NoiseSource()
        return cast("NoiseSource", source)

    @property
    def _record(self) -> StepRecord:
        record = self.__dict__.setdefault("_poprisk_record", StepRecord())
        return cast("StepRecord", record)

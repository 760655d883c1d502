"""PopRiskAdamW without touching the module."""

from typing import Any, Literal

import torch

from poprisk_integrations.lightning._upstream import (
    Callback,
    LightningModule,
    Trainer,
    rank_zero_info,
)
from poprisk_integrations.lightning.adam_replacement import poprisk_adamw_from, rebind_scheduler
from poprisk_integrations.lightning.callbacks.refusals import refuse_engine
from poprisk_integrations.optim import PopRiskAdamW

__all__ = ["PopRiskOptimizer"]


class PopRiskOptimizer(Callback):
    """Replaces the Adam or AdamW that `configure_optimizers` returns by PopRiskAdamW.

    Same parameter groups, learning rates, betas, eps and weight decay; learning-rate schedulers
    are re-bound. It happens in `on_fit_start`: after the strategy has wrapped the module, before
    a checkpoint's optimizer states are restored, so checkpoints of AdamW and of PopRiskAdamW both
    load (with the gate options that PopRiskAdamW's checkpoint was written with). List it before
    callbacks that keep the optimizer from `on_fit_start` on. `Tuner.lr_find` and
    `scale_batch_size` run without callbacks, hence with the module's own optimizer.

    A parameter group of the module may carry any of the options below, e.g.
    `{"params": router, "gate": "none"}`; the ones here are for groups without their own.

    Args:
        gate: "soft", "hard", "snr" or "none" (AdamW).
        alpha: The gate opens where m_hat^2 > alpha * s_hat. A number, "calibrated", "fresh" (1)
            or "finite" (b/(n-b)).
        false_open_rate: Share of pure-noise coordinates that pass; for alpha="calibrated".
        lambda_pop: Shrinkage beyond the boundary; None for the gate's own.
        rho: Decay of the noise variance, in [0, 1).
        gate_warmup: Steps that stay ungated while the noise is measured.
        gate_blend: w in [0, 1]; the update uses w * q + (1 - w).
        preserve_norm: Rescale each tensor's gated update to the norm of the ungated one.
        batch_size: Global batch size b, for alpha="finite".
        dataset_size: Number of training examples n, for alpha="finite".
        state_dtype: None (float32), "bfloat16", "8bit" (experimental), or a dict per state.
        gate_decay: Gate the weight decay too.
        gate_eps: Constant in the gate's denominator, on the scale of squared gradients.
        noise_mean: "bias_corrected" or "raw" (the published rule).
        noise_source: "temporal", "microbatch" (needs accumulate_grad_batches >= 2) or "ranks"
            (needs DDP).
        stochastic_rounding: Round bfloat16 parameters stochastically.
        rounding_seed: Seed of all stochastic rounding.
        skip_nonfinite: Skip steps with a non-finite gradient.
        collect_stats_every: Sample gate statistics on every k-th step; 0 for never. The callback
            PopRiskMonitor sets it.

    Raises:
        ValueError: If an option has a value that it cannot have.
        MisconfigurationException: When `fit` starts, for any other optimizer, by name, for one
            whose settings or state would be lost, and under DeepSpeed.

    Example:
        >>> PopRiskOptimizer(gate="hard", false_open_rate=0.01).options["gate"]
        'hard'
    """

    def __init__(
        self,
        gate: Literal["soft", "hard", "snr", "none"] = "soft",
        alpha: float | Literal["calibrated", "fresh", "finite"] = "calibrated",
        false_open_rate: float = 0.3173,
        lambda_pop: float | None = None,
        rho: float = 0.99,
        gate_warmup: int = 0,
        gate_blend: float = 1.0,
        preserve_norm: bool = False,
        batch_size: int | None = None,
        dataset_size: int | None = None,
        state_dtype: str | dict[str, str] | None = None,
        gate_decay: bool = False,
        gate_eps: float = 0.0,
        noise_mean: Literal["bias_corrected", "raw"] = "bias_corrected",
        noise_source: Literal["temporal", "microbatch", "ranks"] = "temporal",
        stochastic_rounding: bool = True,
        rounding_seed: int = 0,
        skip_nonfinite: bool = True,
        collect_stats_every: int = 0,
    ) -> None:
        self.options: dict[str, Any] = {
            "gate": gate,
            "alpha": alpha,
            "false_open_rate": false_open_rate,
            "lambda_pop": lambda_pop,
            "rho": rho,
            "gate_warmup": gate_warmup,
            "gate_blend": gate_blend,
            "preserve_norm": preserve_norm,
            "batch_size": batch_size,
            "dataset_size": dataset_size,
            "state_dtype": state_dtype,
            "gate_decay": gate_decay,
            "gate_eps": gate_eps,
            "noise_mean": noise_mean,
            "noise_source": noise_source,
            "stochastic_rounding": stochastic_rounding,
            "rounding_seed": rounding_seed,
            "skip_nonfinite": skip_nonfinite,
            "collect_stats_every": collect_stats_every,
        }
        PopRiskAdamW([torch.zeros(1)], **self.options)  # refuses bad values now, not in fit

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace every optimizer and re-bind its schedulers."""
        refuse_engine(trainer)
        old = trainer.optimizers
        new = [poprisk_adamw_from(optimizer, self.options) for optimizer in old]
        for config in trainer.lr_scheduler_configs:
            index = next(i for i, o in enumerate(old) if o is config.scheduler.optimizer)
            rebind_scheduler(config.scheduler, old[index], new[index])
        trainer.strategy.optimizers = list(new)
        names = " and ".join(sorted({type(o).__name__ for o in old}))
        rank_zero_info(
            f"PopRiskOptimizer: PopRiskAdamW (gate={self.options['gate']!r}, "
            f"alpha={self.options['alpha']!r}) replaces {names} over the same "
            f"{sum(len(o.param_groups) for o in new)} parameter group(s)."
        )

"""Options of one parameter group: checked when the group is added, resolved at each step."""

import math
import numbers
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from poprisk_integrations.core.alpha import resolve_alpha
from poprisk_integrations.core.gate import GATES, default_lambda_pop
from poprisk_integrations.core.noise import noise_is_ready
from poprisk_integrations.optim._moments import MOMENTS, STATE_FORMATS

__all__ = ["GroupOptions", "StepScalars", "check_group", "resolve_group", "step_scalars"]

NOISE_MEANS = ("bias_corrected", "raw")
FLAGS = (
    "preserve_norm",
    "gate_decay",
    "maximize",
    "stochastic_rounding",
    "capturable",
    "skip_nonfinite",
)
NOISE_SOURCES = ("temporal", "microbatch", "ranks")


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupOptions:
    """Numbers that one step of one group needs; names as in `PopRiskAdamW`."""

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    gate: str
    alpha: float
    lambda_pop: float
    gate_eps: float
    rho: float
    gate_warmup: int
    gate_blend: float
    gate_decay: bool
    preserve_norm: bool
    centered: bool
    from_pieces: bool
    maximize: bool
    capturable: bool
    stochastic_rounding: bool
    rounding_seed: int

    @property
    def gated(self) -> bool:
        """Whether this group's update can differ from AdamW's."""
        return self.gate != "none" and self.gate_blend > 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class StepScalars:
    """Scalars of one parameter at one step, known on the host.

    Attributes:
        mean_scale: m_hat_{t-1} = mean_scale * m_{t-1} (1 for the published rule); None while
            there is no mean to deviate from, or where none is needed.
        bias_correction1: 1 - beta1^t.
        bias_correction2_sqrt: sqrt(1 - beta2^t).
        noise_scale: bias_correction1^2 / (1 - rho^k), k = deviations seen, this step's included:
            the gate of m^2 and noise_scale * s is the gate of m_hat^2 and s_hat.
        gate_is_active: False while the update is ungated (first step, warm-up).
        noise_is_signal: The published rule's first step, where s_hat = m_hat^2 by algebra (and
            noise_scale is 1).
    """

    mean_scale: float | None
    bias_correction1: float
    bias_correction2_sqrt: float
    noise_scale: float
    gate_is_active: bool
    noise_is_signal: bool


def step_scalars(options: GroupOptions, step: float, dev_step: float) -> StepScalars:
    """Scalars of a step from its number and from the deviations seen before it."""
    previous = 1.0 - options.beta1 ** (step - 1)
    mean_scale: float | None = 1.0
    if options.from_pieces:
        mean_scale = None  # s and its count are up to date: see `_noise_source.py`
    elif options.centered:
        mean_scale = 1.0 / previous if previous > 0.0 else None
    seen = dev_step + (mean_scale is not None)
    bias_correction1 = 1.0 - options.beta1**step
    noise_is_signal = not options.centered and step == 1
    # Pieces measure the noise from the first step on; the gate starts at the same step as without.
    measured = int(seen) - options.from_pieces
    is_ready = noise_is_ready(measured, options.gate_warmup, centered=options.centered)
    noise_scale = 1.0
    if is_ready and not noise_is_signal:
        noise_scale = bias_correction1**2 / (1.0 - options.rho**seen)
    return StepScalars(
        mean_scale=mean_scale,
        bias_correction1=bias_correction1,
        bias_correction2_sqrt=(1.0 - options.beta2**step) ** 0.5,
        noise_scale=noise_scale,
        gate_is_active=options.gated and is_ready,
        noise_is_signal=noise_is_signal,
    )


def resolve_group(group: dict[str, Any]) -> GroupOptions:
    """Numbers of a step from the group's options.

    Args:
        group: A parameter group, complete (every option present).

    Raises:
        ValueError: If `alpha` cannot be resolved, e.g. "finite" without sizes.
    """
    beta1, beta2 = group["betas"]
    alpha = resolve_alpha(
        group["alpha"],
        beta1=beta1,
        false_open_rate=group["false_open_rate"],
        batch_size=group["batch_size"],
        dataset_size=group["dataset_size"],
    )
    lambda_pop = group["lambda_pop"]
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.device.type == "cpu":
        lr = float(lr)  # no device is waited for
    return GroupOptions(
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        gate=group["gate"],
        alpha=alpha,
        lambda_pop=default_lambda_pop(group["gate"], alpha) if lambda_pop is None else lambda_pop,
        gate_eps=group["gate_eps"],
        rho=group["rho"],
        gate_warmup=group["gate_warmup"],
        gate_blend=group["gate_blend"],
        gate_decay=group["gate_decay"],
        preserve_norm=group["preserve_norm"],
        centered=group["noise_mean"] == "bias_corrected",
        from_pieces=group["noise_source"] != "temporal",
        maximize=group["maximize"],
        capturable=group["capturable"],
        stochastic_rounding=group["stochastic_rounding"],
        rounding_seed=group["rounding_seed"],
    )


def check_group(group: dict[str, Any]) -> None:
    """Refuse options that cannot mean what the user wants.

    Args:
        group: A parameter group, complete.

    Raises:
        ValueError: Naming the argument, its value and the allowed values.
    """
    _check_lr(group["lr"])
    betas = group["betas"]
    if not (isinstance(betas, (tuple, list)) and len(betas) == 2):
        raise ValueError(f"Invalid betas: {betas!r}. Must be two numbers in [0, 1).")
    for index, beta in enumerate(betas):
        if not _in_range(beta, 0.0, 1.0, right_open=True):
            raise ValueError(
                f"Invalid beta parameter at index {index}: {beta}. Must be a float in [0, 1)."
            )
    for name in ("eps", "weight_decay", "gate_eps"):
        if not _in_range(group[name], 0.0, math.inf, right_open=True):
            raise ValueError(f"Invalid {name} value: {group[name]}. Must be a number >= 0.")
    choices = (("gate", GATES), ("noise_mean", NOISE_MEANS), ("noise_source", NOISE_SOURCES))
    for name, allowed in choices:
        if group[name] not in allowed:
            raise ValueError(f"Invalid {name}: {group[name]!r}. Must be one of {allowed}.")
    if group["noise_source"] != "temporal" and group["noise_mean"] == "raw":
        raise ValueError(
            f"Invalid noise_source: {group['noise_source']!r}. Must be 'temporal' with "
            "noise_mean='raw', the published rule."
        )
    if "adaptive" in group:
        raise ValueError(
            "Invalid groups: 'adaptive' is an option of SAM, whose 'rho' (a radius) stands in the "
            "same groups as PopRiskAdamW's (a decay). Rename SAM's rho, and use no 'adaptive'."
        )
    if not _in_range(group["rho"], 0.0, 1.0, right_open=True):
        raise ValueError(f"Invalid rho: {group['rho']}. Must be in [0, 1).")
    if not _in_range(group["gate_blend"], 0.0, 1.0):
        raise ValueError(f"Invalid gate_blend: {group['gate_blend']}. Must be in [0, 1].")
    lambda_pop = group["lambda_pop"]
    if lambda_pop is not None and not _in_range(lambda_pop, 0.0, math.inf, right_open=True):
        raise ValueError(f"Invalid lambda_pop: {lambda_pop}. Must be a number >= 0, or None.")
    for name in ("gate_warmup", "collect_stats_every", "rounding_seed"):
        value = group[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"Invalid {name}: {value!r}. Must be an integer >= 0.")
    if group["rounding_seed"] >= 1 << 31:
        raise ValueError(f"Invalid rounding_seed: {group['rounding_seed']}. Must be below 2^31.")
    for name in ("batch_size", "dataset_size"):
        value = group[name]
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"Invalid {name}: {value!r}. Must be an integer >= 1, or None.")
    for name in (
        "preserve_norm",
        "gate_decay",
        "maximize",
        "stochastic_rounding",
        "capturable",
        "skip_nonfinite",
    ):
        if not isinstance(group[name], bool):
            raise ValueError(f"Invalid {name}: {group[name]!r}. Must be True or False.")
    if group["foreach"] not in (None, True, False):
        raise ValueError(f"Invalid foreach: {group['foreach']!r}. Must be None, True or False.")
    if group["fused"] not in (None, True, False):
        raise ValueError(f"Invalid fused: {group['fused']!r}. Must be None, True or False.")
    if group["foreach"] and group["fused"]:
        raise ValueError("Invalid foreach and fused: both True. At most one of them may be.")
    if group.get("differentiable"):
        raise ValueError(
            "Invalid differentiable: True. Must be False: a step is not differentiated through."
        )
    _check_state_dtype(group["state_dtype"])
    stored = group["state_dtype"]
    stored = stored.get("exp_dev_sq") if isinstance(stored, dict) else stored
    if group["noise_source"] != "temporal" and stored not in (None, "float32"):
        raise ValueError(
            f"Invalid state_dtype: {stored!r} for exp_dev_sq. Must be None or 'float32' with "
            f"noise_source={group['noise_source']!r}."
        )
    resolve_group(group)


def _check_lr(lr: Any) -> None:
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if lr.device.type != "cpu":
            return  # reading it would wait for the device
        lr = float(lr)
    if not _in_range(lr, 0.0, math.inf, right_open=True):
        raise ValueError(f"Invalid learning rate: {lr}. Must be a number >= 0.")


def _check_state_dtype(value: Any) -> None:
    chosen = value if isinstance(value, dict) else {"exp_avg": value}
    allowed = (None, *STATE_FORMATS)
    if all(k in MOMENTS and v in allowed for k, v in chosen.items()):
        return
    raise ValueError(
        f"Invalid state_dtype: {value!r}. Must be one of {allowed} or a dict with keys from "
        f"{MOMENTS}."
    )


def _in_range(value: Any, low: float, high: float, *, right_open: bool = False) -> bool:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    return low <= float(value) < high if right_open else low <= float(value) <= high

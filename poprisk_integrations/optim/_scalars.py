"""Scalars of a step: from step counts that the host knows, or that only the device knows."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from poprisk_integrations.core.noise import noise_is_ready
from poprisk_integrations.optim._options import GroupOptions

__all__ = [
    "COLUMNS",
    "StepScalars",
    "is_capturing",
    "positions_on",
    "scalar_row",
    "scalar_rows",
    "step_scalars",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepScalars:
    """Scalars of one parameter at one step, known on the host."""

    # m_hat_{t-1} = mean_scale * m_{t-1} (1 for the published rule); None while there is no mean
    # to deviate from, or where none is needed
    mean_scale: float | None
    bias_correction1: float  # 1 - beta1^t
    bias_correction2_sqrt: float  # sqrt(1 - beta2^t)
    # bias_correction1^2 / (1 - rho^k), k = deviations seen, this step's included: the gate of m^2
    # and noise_scale * s is the gate of m_hat^2 and s_hat. Without s it is bias_correction1^2 /
    # bias_correction2, and the noise beside m^2 is max(noise_scale * v - m^2, 0).
    noise_scale: float
    gate_is_active: bool  # False while the update is ungated (first step, warm-up)
    # the published rule's first step, where s_hat = m_hat^2 by algebra (and noise_scale is 1)
    noise_is_signal: bool


def step_scalars(options: GroupOptions, step: float, dev_step: float) -> StepScalars:
    """Scalars of a step from its number and from the deviations seen before it."""
    previous = 1.0 - options.beta1 ** (step - 1)
    mean_scale: float | None = 1.0
    if options.from_pieces or options.from_moments:
        mean_scale = None  # s and its count are up to date (`_noise_source.py`), or not there
    elif options.centered:
        mean_scale = 1.0 / previous if previous > 0.0 else None
    seen = step - 1 if options.from_moments else dev_step + (mean_scale is not None)
    bias_correction1 = 1.0 - options.beta1**step
    noise_is_signal = not options.centered and step == 1
    # Pieces measure the noise from the first step on; the gate starts at the same step as without.
    measured = int(seen) - options.from_pieces
    is_ready = noise_is_ready(measured, options.gate_warmup, centered=options.centered)
    noise_scale = 1.0
    if options.from_moments:
        noise_scale = bias_correction1**2 / (1.0 - options.beta2**step)
    elif is_ready and not noise_is_signal:
        noise_scale = bias_correction1**2 / (1.0 - options.rho**seen)
    return StepScalars(
        mean_scale=mean_scale,
        bias_correction1=bias_correction1,
        bias_correction2_sqrt=(1.0 - options.beta2**step) ** 0.5,
        noise_scale=noise_scale,
        gate_is_active=options.gated and is_ready,
        noise_is_signal=noise_is_signal,
    )


# A kernel that takes its scalars from memory needs no compilation when they change, and no host
# that knows them.
COLUMNS = (
    "keep",  # 0: the step leaves no trace
    "grad_factor",  # 1 / loss scale
    "mean_scale",  # m_hat_{t-1} = mean_scale * m_{t-1}
    "dev_decay",  # s <- dev_decay * s + dev_weight * (g - m_hat_{t-1})^2
    "dev_weight",
    "mean_weight",  # m <- m + mean_weight * (g - m)
    "sq_decay",  # v <- sq_decay * v + sq_weight * g^2
    "sq_weight",
    "bias_correction2_sqrt",
    "noise_scale",  # without s: m^2 and max(noise_scale * v - m^2, 0) are signal and noise
    "eps",
    "boundary",  # alpha * noise_scale: open where m^2 > boundary * s
    "penalty",  # lambda_pop * noise_scale (soft), lambda_pop * alpha * noise_scale (snr)
    "gate_eps",  # times bias_correction1^2, on the scale of m^2
    "blend",  # the update takes blend * q + 1 - blend; 0 while ungated
    "noise_is_signal",  # 1: the published rule's first step, s taken as m^2
    "step_size",  # lr / bias_correction1
    "weight_decay",  # lr * weight_decay
    "param_scale",  # 1 - lr * weight_decay
)


def scalar_row(
    options: GroupOptions, step: float, dev_step: float, grad_factor: float
) -> list[float]:
    """The columns from the `step_scalars` of a step, for kernels of the host."""
    s = step_scalars(options, step, dev_step)
    weight = 1 - options.rho if options.gated and s.mean_scale is not None else 0.0
    noise_scale = 1.0 if options.from_moments else s.noise_scale
    shrink = options.alpha if options.gate == "snr" else 1.0
    decay = float(options.lr) * options.weight_decay
    columns = {
        "keep": 1.0,
        "grad_factor": grad_factor,
        "mean_scale": s.mean_scale or 0.0,
        "dev_decay": 1 - weight,
        "dev_weight": weight,
        "mean_weight": 1 - options.beta1,
        "sq_decay": options.beta2,
        "sq_weight": 1 - options.beta2,
        "bias_correction2_sqrt": s.bias_correction2_sqrt,
        "noise_scale": s.noise_scale,
        "eps": options.eps,
        "boundary": options.alpha * noise_scale,
        "penalty": options.lambda_pop * shrink * noise_scale,
        "gate_eps": options.gate_eps * s.bias_correction1**2,
        "blend": options.gate_blend if s.gate_is_active else 0.0,
        "noise_is_signal": float(s.noise_is_signal),
        "step_size": float(options.lr) / s.bias_correction1,
        "weight_decay": decay,
        "param_scale": 1 - decay,
    }
    return [columns[name] for name in COLUMNS]


def scalar_rows(
    options: GroupOptions,
    steps: Sequence[Tensor],
    dev_steps: Sequence[Tensor],
    keep: Tensor | None = None,
    grad_scale: Tensor | None = None,
    *,
    advance: bool = True,
) -> tuple[Tensor, Tensor]:
    """`step_scalars` of all parameters without a look at their counts, which are advanced.

    Arguments as in `step_group`, with a `keep` of None for 1, and no `dev_steps` where there is no
    s. `advance=False` leaves the counts to a later call. Returns a tensor (parameters,
    columns), float64 where the device has it, and the new step counts.
    """
    # 1 - beta^t loses three digits in float32
    device = steps[0].device
    precise = torch.float32 if device.type == "mps" else torch.float64
    before = torch.stack(list(steps)).to(precise)
    zero, one = torch.zeros_like(before), torch.ones_like(before)
    seen = torch.stack(list(dev_steps)).to(precise) if dev_steps else zero
    kept = one if keep is None else keep.to(device, precise) * one

    has_mean, mean_scale = one > 0, one
    if options.centered:
        previous = 1 - options.beta1**before
        has_mean = previous > 0
        mean_scale = torch.where(has_mean, 1 / torch.where(has_mean, previous, one), zero)
    measures = options.gated and not options.from_pieces and not options.from_moments
    moves = (kept * has_mean) if measures else zero
    count = (before + kept).clamp(min=1)
    seen = count - 1 if options.from_moments else seen + moves
    bias_correction1 = 1 - options.beta1**count
    first = max(options.gate_warmup, 1) if options.centered else options.gate_warmup + 1
    first += options.from_pieces
    active = (seen >= first) if options.gated else one < 0
    signal = (count == 1) if not options.centered else one < 0
    noise_scale = bias_correction1.square() / (1 - options.rho ** seen.clamp(min=1))
    noise_scale = torch.where(active & ~signal, noise_scale, one)
    if options.from_moments:
        noise_scale = one  # before alpha
    bias_correction2 = 1 - options.beta2**count
    shrink = options.alpha if options.gate == "snr" else 1.0
    decay = kept * options.lr * options.weight_decay
    columns = {
        "keep": kept,
        "grad_factor": one if grad_scale is None else one / grad_scale.to(device, precise),
        "mean_scale": mean_scale,
        "dev_decay": 1 - moves * (1 - options.rho),
        "dev_weight": moves * (1 - options.rho),
        "mean_weight": kept * (1 - options.beta1),
        "sq_decay": 1 - kept * (1 - options.beta2),
        "sq_weight": kept * (1 - options.beta2),
        "bias_correction2_sqrt": bias_correction2.sqrt(),
        "noise_scale": bias_correction1.square() / bias_correction2,
        "eps": options.eps * one,
        "boundary": options.alpha * noise_scale,
        "penalty": options.lambda_pop * shrink * noise_scale,
        "gate_eps": options.gate_eps * bias_correction1.square(),
        "blend": torch.where(active, options.gate_blend, zero),
        "noise_is_signal": signal.to(precise),
        "step_size": kept * options.lr / bias_correction1,
        "weight_decay": decay,
        "param_scale": 1 - decay,
    }
    for counts, increments in ((steps, kept), (dev_steps, moves)) if advance else ():
        if counts:
            torch._foreach_add_(list(counts), list(increments.to(counts[0].dtype).unbind()))
    return torch.stack([columns[name] for name in COLUMNS], dim=1), count


CAPTURED: list[object] = []  # what graphs read lives as long as the process


def positions_on(device: torch.device, positions: Sequence[int]) -> Tensor:
    """Positions of parameters on their device; copied once, so that no step waits for it."""
    if device.type == "cpu":
        return torch.tensor(positions, dtype=torch.int64, device=device)
    known = _uploaded(device, tuple(positions))
    if is_capturing(device):
        CAPTURED.append(known)
    return known


@lru_cache(maxsize=256)
def _uploaded(device: torch.device, positions: tuple[int, ...]) -> Tensor:
    return upload(torch.tensor(positions, dtype=torch.int64), device)


def upload(host: Tensor, device: torch.device) -> Tensor:
    """A host tensor on a device, without waiting for the copy."""
    if device.type in ("cpu", "meta"):
        return host.to(device)
    # the host's allocator keeps pinned memory until the copy is done
    return host.pin_memory().to(device, non_blocking=True)


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()

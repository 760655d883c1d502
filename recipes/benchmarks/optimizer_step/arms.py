"""The optimizers that are compared: how each is made, and the bytes that its step must move."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from poprisk_integrations import PopRiskAdamW

BASE = "AdamW fused"
ADAMW_BYTES = 28  # p, m, v read and written, g read; float32


@dataclass(frozen=True)
class Arm:
    """One optimizer.

    Attributes:
        make: From parameters to the optimizer.
        dtype: Of parameters and gradients.
        bytes: Bytes per parameter that one pass must move; None where that is not known.
        ours: Whether it is this package's.
    """

    make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
    dtype: torch.dtype = torch.float32
    bytes: float | None = None
    ours: bool = False


def our_arms() -> dict[str, Arm]:
    """Paths and state formats of PopRiskAdamW."""
    bf16_noise = {"exp_dev_sq": "bfloat16"}
    half = torch.bfloat16
    ours = {
        "ours, default": Arm(lambda p: PopRiskAdamW(p), bytes=40),
        "ours, fused": Arm(lambda p: PopRiskAdamW(p, fused=True), bytes=40),
        "ours, fused, check off": Arm(
            lambda p: PopRiskAdamW(p, fused=True, skip_nonfinite=False), bytes=36
        ),
        "ours, fused, gate=none": Arm(lambda p: PopRiskAdamW(p, fused=True, gate="none"), bytes=32),
        "ours, fused, bf16 noise": Arm(
            lambda p: PopRiskAdamW(p, fused=True, state_dtype=bf16_noise), bytes=36
        ),
        "ours, fused, bf16 states": Arm(
            lambda p: PopRiskAdamW(p, fused=True, state_dtype="bfloat16"), bytes=28
        ),
        "ours, fused, 8-bit states": Arm(
            lambda p: PopRiskAdamW(p, fused=True, state_dtype="8bit"), bytes=16 + 6 * 1.0625
        ),
        "ours, single tensor": Arm(lambda p: PopRiskAdamW(p, fused=False)),
        "ours, foreach": Arm(lambda p: PopRiskAdamW(p, foreach=True)),
        "ours, bf16 params": Arm(lambda p: PopRiskAdamW(p, fused=True), half, bytes=8 + 24),
        "ours, bf16 params, bf16 states": Arm(
            lambda p: PopRiskAdamW(p, fused=True, state_dtype="bfloat16"), half, bytes=8 + 12
        ),
    }
    return {name: Arm(a.make, a.dtype, a.bytes, ours=True) for name, a in ours.items()}


def torch_arms() -> dict[str, Arm]:
    """Torch's own."""
    adamw = torch.optim.AdamW
    return {
        BASE: Arm(lambda p: adamw(p, fused=True), bytes=28),
        "AdamW for-loop": Arm(lambda p: adamw(p, foreach=False)),
        "AdamW foreach": Arm(lambda p: adamw(p, foreach=True)),
        "AdamW fused, bf16 params": Arm(lambda p: adamw(p, fused=True), torch.bfloat16, bytes=14),
    }


def rival_arms() -> tuple[dict[str, Arm], dict[str, str]]:
    """Other packages that are installed and run on CPU, and why the others do not."""
    makers = {
        "torchao AdamW8bit": _torchao,
        "bitsandbytes AdamW8bit": _bitsandbytes,
        "schedulefree AdamW": _schedulefree,
        "pytorch_optimizer AdaBelief": _pytorch_optimizer,
        "optimi AdamW": _optimi,
    }
    arms, missing = {}, {}
    for name, maker in makers.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                make = maker()
                probe = torch.nn.Parameter(torch.randn(64, 128))
                probe.grad = torch.randn(64, 128)
                make([probe]).step()
        except Exception as error:  # whatever an optional package can do wrong
            lines = str(error).strip().splitlines()
            missing[name] = f"{type(error).__name__}: {lines[0] if lines else ''}"
        else:
            arms[name] = Arm(make)
    return arms, missing


def _torchao():
    from torchao.optim import AdamW8bit

    return lambda p: AdamW8bit(p)


def _bitsandbytes():
    from bitsandbytes.optim import AdamW8bit

    return lambda p: AdamW8bit(p)


def _schedulefree():
    from schedulefree import AdamWScheduleFree

    def make(params):
        optimizer = AdamWScheduleFree(params)
        optimizer.train()
        return optimizer

    return make


def _pytorch_optimizer():
    # the nearest relative: a second moment of deviations from the mean
    from pytorch_optimizer import AdaBelief

    return lambda p: AdaBelief(p)


def _optimi():
    from optimi import AdamW

    return lambda p: AdamW(p, lr=1e-3)

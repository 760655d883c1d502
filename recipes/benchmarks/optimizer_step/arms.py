"""What is stepped: our paths and formats, torch's AdamW, rivals; over tensors of which shapes."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch

from poprisk_integrations import PopRiskAdamW

__all__ = [
    "ARMS",
    "BASE",
    "SIZES",
    "TEMPORAL",
    "Arm",
    "fused",
    "make",
    "rival_arms",
    "shapes",
    "state_bytes",
]

BASE = "AdamW fused"
SIZES = {"1M": 1 << 20, "20M": 20 << 20, "100M": 100 << 20}
TEMPORAL = {"noise_source": "temporal"}
# The last: a nearest relative, with a second moment of deviations from the mean.
RIVALS = {
    "torchao AdamW8bit": ("torchao.optim", "AdamW8bit", {}),
    "bitsandbytes AdamW8bit": ("bitsandbytes.optim", "AdamW8bit", {}),
    "schedulefree AdamW": ("schedulefree", "AdamWScheduleFree", {}),
    "pytorch_optimizer AdaBelief": ("pytorch_optimizer", "AdaBelief", {}),
    "optimi AdamW": ("optimi", "AdamW", {"lr": 1e-3}),
}

Shapes = list[tuple[int, ...]]


@dataclass(frozen=True)
class Arm:
    """One optimizer: how it is made, of which dtype the parameters are, how many bytes it moves.

    `bytes`: per parameter, that one pass must read and write; None where that is not known.
    `slow`: too slow to be repeated at 100M parameters.
    """

    make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
    bytes: float | None = None
    dtype: torch.dtype = torch.float32
    slow: bool = False


def _adamw(**options: Any) -> Callable[[list], torch.optim.Optimizer]:
    return partial(torch.optim.AdamW, **options)


def _ours(**options: Any) -> Callable[[list], torch.optim.Optimizer]:
    return partial(PopRiskAdamW, **options)


fused, _half = partial(_ours, fused=True), torch.bfloat16
_temporal = partial(fused, **TEMPORAL)
ARMS = {
    BASE: Arm(_adamw(fused=True), 28),
    "AdamW for-loop": Arm(_adamw(foreach=False), slow=True),
    "AdamW foreach": Arm(_adamw(foreach=True), slow=True),
    "AdamW fused, bf16 params": Arm(_adamw(fused=True), 14, _half),
    "ours, default": Arm(_ours(), 32),
    "ours, fused": Arm(fused(), 32),
    "ours, fused, check off": Arm(fused(skip_nonfinite=False), 28),
    "ours, fused, gate=none": Arm(fused(gate="none"), 32),
    "ours, fused, temporal": Arm(_temporal(), 40),
    "ours, fused, temporal, check off": Arm(_temporal(skip_nonfinite=False), 36),
    "ours, fused, rows": Arm(_temporal(granularity="row"), slow=True),
    "ours, fused, tensors of moments": Arm(fused(granularity="tensor"), slow=True),
    "ours, fused, bf16 noise": Arm(_temporal(state_dtype={"exp_dev_sq": "bfloat16"}), 36),
    "ours, fused, bf16 states": Arm(fused(state_dtype="bfloat16"), 24),
    "ours, fused, 8-bit states": Arm(fused(state_dtype="8bit"), 16 + 4 * 1.0625),
    "ours, single tensor": Arm(_ours(fused=False), slow=True),
    "ours, foreach": Arm(_ours(foreach=True), slow=True),
    "ours, bf16 params": Arm(fused(), 8 + 16, _half),
    "ours, bf16 params, bf16 states": Arm(fused(state_dtype="bfloat16"), 8 + 8, _half),
}


def rival_arms() -> dict[str, Arm]:
    """Other packages that are installed and run on CPU; says why the others do not."""
    arms = {}
    for name, (module, attribute, options) in RIVALS.items():

        def make(params: list, module=module, attribute=attribute, options=options):
            optimizer = getattr(import_module(module), attribute)(params, **options)
            if attribute == "AdamWScheduleFree":
                optimizer.train()
            return optimizer

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                probe = torch.nn.Parameter(torch.randn(64, 128))
                probe.grad = torch.randn(64, 128)
                make([probe]).step()
        except Exception as error:  # whatever an optional package can do wrong
            lines = [*str(error).strip().splitlines(), ""]
            print(f"left out: {name} ({type(error).__name__}: {lines[0]})", flush=True)
        else:
            arms[name] = Arm(make, slow=True)
    return arms


def shapes(numel: int, layout: str) -> Shapes:
    """Shapes that add up to about `numel` elements."""
    if layout == "small":
        return [(128, 128)] * max(1, numel >> 14)
    tensors = 49 if numel >= 1 << 22 else 7
    rows = max(2, numel // 512 // tensors)
    return [(rows + (i % 3) - 1, 512) for i in range(tensors)]


def make(arm: Arm, sizes: Shapes) -> torch.optim.Optimizer:
    """The arm's optimizer with parameters and gradients; the same for the same shapes."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in sizes:
        p = torch.randn(shape, generator=generator) * 0.02
        param = torch.nn.Parameter(p.to(arm.dtype))
        param.grad = (torch.randn(shape, generator=generator) * 1e-3).to(arm.dtype)
        params.append(param)
    return arm.make(params)


def _tensors_in(value: Any) -> list[torch.Tensor]:
    """Plain tensors inside a state entry (subclasses hold several)."""
    if isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__") and type(value) is not torch.Tensor:
            names, _ = value.__tensor_flatten__()
            return [t for name in names for t in _tensors_in(getattr(value, name))]
        return [value]
    if isinstance(value, dict):
        return [t for item in value.values() for t in _tensors_in(item)]
    return []


def state_bytes(optimizer: torch.optim.Optimizer) -> float:
    """Bytes of tensors in the state, per parameter."""
    found = [t for state in optimizer.state.values() for t in _tensors_in(state) if t.dim()]
    numel = sum(p.numel() for g in optimizer.param_groups for p in g["params"])
    return sum(t.numel() * t.element_size() for t in found) / numel

"""PopRiskAdamW described as torch describes its own optimizers, and the cells that tests run on.

`OptimizerInfo` comes with torch; the tests that torch drives with it do not, so those here are
written anew.
"""

import copy
import warnings

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, ReduceLROnPlateau

from poprisk_integrations import PopRiskAdamW

with warnings.catch_warnings():
    # torch's helpers warn where the optional hypothesis is missing
    warnings.simplefilter("ignore", ImportWarning)
    from torch.testing._internal.common_optimizers import (
        ErrorOptimizerInput,
        OptimizerErrorEnum,
        OptimizerInfo,
        OptimizerInput,
    )

__all__ = [
    "EAGER",
    "EVERY",
    "IMPLEMENTATIONS",
    "INFO",
    "OptimizerErrorEnum",
    "flags",
    "inputs",
    "needs_cuda",
    "snapshot",
    "unchanged",
]

# `fused=False` also where it is the default now: what None picks may depend on the machine.
IMPLEMENTATIONS = {
    "single_tensor": {"foreach": False, "fused": False},
    "foreach": {"foreach": True, "fused": False},
    "capturable": {"capturable": True, "fused": False},
    "fused": {"fused": True},
}
EVERY = list(IMPLEMENTATIONS)
EAGER = [name for name in IMPLEMENTATIONS if name != "fused"]

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def optimizer_inputs(device, dtype=None):
    """Option sets, without parameters and without the flags that choose an implementation."""
    sets = {
        "default": {},
        "lr": {"lr": 0.01},
        "tensor lr": {"lr": torch.tensor(0.001)},
        "decay": {"weight_decay": 0.1},
        "maximize": {"weight_decay": 0.1, "maximize": True},
        "hard": {"gate": "hard"},
        "snr": {"gate": "snr", "alpha": "fresh"},
        "none": {"gate": "none"},
        "warm-up, blend": {"gate_warmup": 3, "gate_blend": 0.5},
        "norm": {"preserve_norm": True},
        "gated decay": {"weight_decay": 0.1, "gate_decay": True},
        "published": {
            "alpha": 1.0,
            "lambda_pop": 0.0,
            "gate_eps": 1e-12,
            "noise_mean": "raw",
        },
        "betas": {"betas": (0.0, 0.9), "rho": 0.5, "eps": 1e-3},
        "statistics": {"collect_stats_every": 1},
    }
    return [OptimizerInput(params=None, kwargs=kw, desc=desc) for desc, kw in sets.items()]


def optimizer_error_inputs(device, dtype):
    """What must raise, and how; bad numbers of every option are in `test_options.py`."""

    def wrong(desc, error, message, params=None, **kwargs):
        return ErrorOptimizerInput(
            OptimizerInput(params=params, kwargs=kwargs, desc=desc),
            error_on=OptimizerErrorEnum.CONSTRUCTION_ERROR,
            error_type=error,
            error_regex=message,
        )

    leaf = torch.nn.Parameter(torch.ones(2, device=device, dtype=dtype))
    other = torch.nn.Parameter(torch.ones(2, device=device, dtype=dtype))
    return [
        wrong("a tensor", TypeError, "should be an iterable of Tensors or dicts", params=leaf),
        wrong("no parameters", ValueError, "empty parameter list", params=[]),
        wrong("not a tensor", TypeError, "can only optimize Tensors", params=[1.0]),
        wrong("not a leaf", ValueError, "can't optimize a non-leaf Tensor", params=[leaf * 2]),
        wrong("a set", TypeError, "ordered collections", params=[{"params": {leaf}}]),
        wrong(
            "in two groups",
            ValueError,
            "some parameters appear in more than one parameter group",
            params=[{"params": [leaf]}, {"params": [leaf, other]}],
        ),
        wrong("amsgrad", TypeError, "unexpected keyword argument 'amsgrad'", amsgrad=True),
        wrong("differentiable", ValueError, "Invalid differentiable: True", differentiable=True),
        wrong("two impls", ValueError, "Invalid foreach and fused", foreach=True, fused=True),
        wrong("fused", ValueError, "Invalid fused: 'yes'", fused="yes"),
        wrong("capturable", ValueError, "Invalid capturable: None", capturable=None),
        wrong("maximize", ValueError, "Invalid maximize: 1", maximize=1),
        wrong("lr vector", ValueError, "Tensor lr must be 1-element", lr=torch.ones(2)),
        wrong("lr text", ValueError, "Invalid learning rate: 1e-3", lr="1e-3"),
        wrong("betas", ValueError, "Invalid betas: 0.9", betas=0.9),
        wrong("beta2", ValueError, "Invalid beta parameter at index 1: 1.5", betas=(0.9, 1.5)),
        wrong("eps", ValueError, "Invalid eps value: inf", eps=float("inf")),
    ]


INFO = OptimizerInfo(
    PopRiskAdamW,
    optim_inputs_func=optimizer_inputs,
    optim_error_inputs_func=optimizer_error_inputs,
    scheduler_inputs=(
        [lambda opt: CosineAnnealingLR(opt, T_max=40)],
        [lambda opt: LinearLR(opt, start_factor=0.5), lambda opt: ReduceLROnPlateau(opt)],
    ),
    supported_impls=("foreach", "fused"),
    not_og_supported_flags=(),
    has_capturable_arg=True,
    supports_complex=True,
    supports_multiple_devices=False,
    supports_fused_on=("cpu", "cuda"),
)


def inputs(*without):
    """The option sets as pytest parameters, named; those named in `without` left out."""
    return [
        pytest.param(entry.kwargs, id=entry.desc)
        for entry in INFO.optim_inputs_func("cpu")
        if entry.desc not in without
    ]


def flags(implementation, device="cpu", **kwargs):
    """Constructor arguments of an implementation, or a skip that says why it is not there."""
    chosen = {**IMPLEMENTATIONS[implementation], **copy.deepcopy(kwargs)}
    if device != "cpu" and implementation in ("single_tensor", "foreach"):
        pytest.skip("accelerators have one eager path: capturable")
    if implementation == "fused":
        probe = [torch.nn.Parameter(torch.ones(4, device=device))]
        try:
            path = PopRiskAdamW(probe, **chosen).path
        except ValueError as error:
            pytest.skip(f"fused=True is refused on {device}: {error}")
        if not path.startswith("fused"):
            pytest.skip(f"fused=True runs as {path} with {kwargs} on {device}")
    return chosen


def snapshot(optimizer):
    """All that a refused call must leave alone."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return copy.deepcopy((optimizer.state_dict(), [p.detach() for p in params]))


def unchanged(optimizer, before):
    """Whether the optimizer is still as in `snapshot`, bit for bit."""
    now = snapshot(optimizer)
    return _equal(now, before)


def _equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a == b

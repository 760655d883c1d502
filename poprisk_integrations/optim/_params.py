"""Parameters and gradients that the optimizer refuses, before it changes anything."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_gradients", "check_params"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.complex128)


def check_params(params: Sequence[Tensor]) -> None:
    """Refuse parameters of one group that cannot be trained together or at all.

    Raises:
        ValueError: Naming the dtype or the devices.
    """
    for param in params:
        is_trainable = param.is_floating_point() or param.is_complex()
        if is_trainable and param.dtype not in _DTYPES:
            raise ValueError(_wrong_dtype(param))
    devices = sorted({str(param.device) for param in params})
    if len(devices) > 1:
        raise ValueError(f"Invalid parameter devices: {devices}. One group must be on one device.")


def check_gradients(groups: Iterable[dict[str, Any]]) -> None:
    """Refuse sparse gradients, and parameters converted to float16 since they were checked.

    Raises:
        RuntimeError: torch's type for both.
    """
    for group in groups:
        for param in group["params"]:
            if param.grad is None:
                continue
            if param.dtype not in _DTYPES:
                raise RuntimeError(_wrong_dtype(param))
            if param.grad.is_sparse:
                raise RuntimeError(
                    "PopRiskAdamW does not support sparse gradients: a row's noise cannot be "
                    "told from its absence. Use sparse=False for embeddings."
                )


def _wrong_dtype(param: Tensor) -> str:
    return (
        f"Invalid parameter dtype: {param.dtype}. Small updates round to nothing in it: use "
        "float32 parameters with autocast, or bfloat16."
    )

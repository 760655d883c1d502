"""Moments as they are stored: float32, bfloat16, or 8-bit codes with scales."""

from typing import Any, Protocol

import torch
from torch import Tensor

from poprisk_integrations.distributed import is_dtensor, local_tensor
from poprisk_integrations.optim._block_codes import BLOCK, decode_blocks, encode_blocks
from poprisk_integrations.optim._rounding import round_to_bfloat16_

__all__ = ["MOMENTS", "STATE_FORMATS", "Moment", "moment_format", "moment_of", "new_moment"]

MOMENTS = ("exp_avg", "exp_avg_sq", "exp_dev_sq")
STATE_FORMATS = ("float32", "bfloat16", "8bit")
WIDE_DTYPES = (torch.float64, torch.complex64, torch.complex128)  # moments keep the parameter's
# Below these sizes scales and rounding noise cost more than the bytes are worth.
MIN_CODED_NUMEL = 4096
MIN_CODED_ROW = BLOCK


class Moment(Protocol):
    """One moment of one parameter, as the paths see it: this rank's shard."""

    def read(self) -> Tensor:
        """The values to work on: the state itself, or a float32 copy of a low-precision one."""

    def write(self, values: Tensor, draw: Tensor | None, keep: Tensor | None = None) -> None:
        """Store what `read` gave after work on it; no-op where that was the state itself.

        Args:
            values: Same shape as read.
            draw: From `uniform16`; None rounds to nearest.
            keep: 0-dim, 0 where the step leaves no trace (codes do not survive a round trip).
        """

    @property
    def kind(self) -> str:
        """One of `STATE_FORMATS`; "float32" stands for any dtype that `read` gives as it is."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is stored: the values, or codes and scales."""

    @property
    def is_exact(self) -> bool:
        """Whether `read` gives the state itself, so that in-place work is enough."""


class _Exact:
    kind = "float32"
    is_exact = True

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = _real(local_tensor(tensor))
        self.tensors = (self.tensor,)

    def read(self) -> Tensor:
        return self.tensor

    def write(self, values: Tensor, draw: Tensor | None, keep: Tensor | None = None) -> None:
        if values is not self.tensor:
            self.tensor.copy_(values)


class _Rounded:
    kind = "bfloat16"
    is_exact = False

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = local_tensor(tensor)
        self.tensors = (self.tensor,)

    def read(self) -> Tensor:
        return self.tensor.float()

    def write(self, values: Tensor, draw: Tensor | None, keep: Tensor | None = None) -> None:
        round_to_bfloat16_(self.tensor, values, draw)


class _Coded:
    kind = "8bit"
    is_exact = False

    def __init__(self, key: str, codes: Tensor, scale: Tensor) -> None:
        self.key = key
        self.codes, self.scale = self.tensors = local_tensor(codes), local_tensor(scale)

    def read(self) -> Tensor:
        flat = self.codes.view(self.codes.shape[0], self._row())
        return decode_blocks(flat, self.scale, self.key).view(self.codes.shape)

    def write(self, values: Tensor, draw: Tensor | None, keep: Tensor | None = None) -> None:
        rows, row = self.codes.shape[0], self._row()
        draw = None if draw is None else draw.reshape(rows, row)
        codes, scale = encode_blocks(values.reshape(rows, row), self.key, draw)
        codes = codes.view(self.codes.shape)
        if keep is not None:
            codes = torch.where(keep > 0, codes, self.codes)
            scale = torch.where(keep > 0, scale, self.scale)
        self.codes.copy_(codes)
        self.scale.copy_(scale)

    def _row(self) -> int:
        return int(torch.Size(self.codes.shape[1:]).numel())


def moment_format(param: Tensor, key: str, state_dtype: Any) -> str | torch.dtype:
    """How a moment of this parameter is stored.

    float64 and complex parameters keep their own dtype. 8-bit codes need a matrix of some size,
    judged on the GLOBAL shape, so that the precision does not depend on the world size; smaller
    tensors, vectors and embeddings of short rows stay float32.

    Args:
        param: The parameter (a DTensor where sharded).
        key: One of `MOMENTS`.
        state_dtype: The group's option: None, a format, or a format per key.

    Returns:
        One of `STATE_FORMATS`, or the parameter's dtype where it is kept.
    """
    wanted = state_dtype.get(key) if isinstance(state_dtype, dict) else state_dtype
    if param.dtype in WIDE_DTYPES:
        return param.dtype
    if wanted == "8bit":
        shape = param.shape
        big = param.numel() >= MIN_CODED_NUMEL and len(shape) > 1
        return "8bit" if big and shape[1:].numel() >= MIN_CODED_ROW else "float32"
    return wanted or "float32"


def state_keys(key: str, kind: str | torch.dtype) -> tuple[str, ...]:
    """Names under which a moment of that format is kept in the state."""
    # Codes have names of their own: read into a float32 tensor of the same name they would be
    # taken for values.
    return (f"{key}_codes", f"{key}_scale") if kind == "8bit" else (key,)


def scale_shape(param: Tensor) -> tuple[int, int]:
    """Shape of the scales of a parameter's codes: rows, and blocks within a row."""
    return param.shape[0], -(-param.shape[1:].numel() // BLOCK)


def new_moment(param: Tensor, key: str, kind: str | torch.dtype) -> dict[str, Tensor]:
    """Zeros of a moment, sharded as the parameter.

    Args:
        param: The parameter.
        key: One of `MOMENTS`.
        kind: From `moment_format`.

    Raises:
        ValueError: For 8-bit codes of a DTensor whose rows are split.
    """
    if kind != "8bit":
        dtype = kind if isinstance(kind, torch.dtype) else getattr(torch, kind)
        return {key: torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)}
    codes = torch.zeros_like(param, dtype=torch.uint8, memory_format=torch.contiguous_format)
    shape = scale_shape(param)
    if not is_dtensor(param):
        scale = torch.zeros(shape, dtype=torch.float32, device=param.device)
    else:
        from torch.distributed.tensor import zeros

        placements = param.placements  # type: ignore[attr-defined]
        if not all(
            p.is_replicate() or (type(p).__name__ == "Shard" and p.dim == 0) for p in placements
        ):
            raise ValueError(
                f"Invalid state_dtype: '8bit' for a parameter with placements {placements}. "
                "Blocks must stay within rows: shard dimension 0 only, or use 'bfloat16'."
            )
        scale = zeros(
            shape,
            dtype=torch.float32,
            device_mesh=param.device_mesh,  # type: ignore[attr-defined]
            placements=placements,
        )
    names = state_keys(key, kind)
    return {names[0]: codes, names[1]: scale}


def _keeps_rows(placement: Any) -> bool:
    # a strided shard of dimension 0 has another type, and rows in another order
    is_plain_shard = type(placement).__name__ == "Shard" and placement.dim == 0
    return is_plain_shard or bool(placement.is_replicate())


def moment_of(state: dict[str, Tensor], key: str) -> Moment:
    """The moment kept in a parameter's state, whatever its format."""
    if key not in state:
        codes, scale = state_keys(key, "8bit")
        return _Coded(key, state[codes], state[scale])
    tensor = state[key]
    return _Rounded(tensor) if tensor.dtype == torch.bfloat16 else _Exact(tensor)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if torch.is_complex(tensor) else tensor

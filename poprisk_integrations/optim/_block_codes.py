"""Eight-bit codes of moments: row-aligned blocks with one float32 scale each."""

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["BLOCK", "decode_blocks", "encode_blocks"]

BLOCK = 64
ZERO_CODE = 128


def encode_blocks(values: Tensor, key: str, draw: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes and scales of a matrix; blocks of `BLOCK` elements never cross a row.

    With a = absmax of the block:
        exp_avg:                 x = sign * a * (c / 127)^2,  code 128 + sign * c
        exp_avg_sq, exp_dev_sq:  x = a * (c / 255)^4
    Powers spend the levels on small values, where a linear code is zero. Rounding goes to one of
    the two neighbouring levels, up with the probability that makes it unbiased. Except: a
    positive exp_avg_sq is never coded 0, because the update divides by its root. A zero
    exp_dev_sq opens the gate, which is AdamW.

    Args:
        values: float32, shape (rows, n).
        key: "exp_avg", "exp_avg_sq" or "exp_dev_sq".
        draw: int32 in [0, 65535], shape (rows, n); None rounds to nearest.

    Returns:
        Codes, uint8, shape (rows, n), and scales, float32, shape (rows, ceil(n / BLOCK)).
    """
    n = values.shape[1]
    blocks = _blocks(values)
    scale = blocks.abs().amax(-1)
    # An empty or all-zero block: any divisor will do.
    relative = blocks / scale.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
    relative = relative.flatten(1)[:, :n]  # not reshape(rows, -1): a shard may have no rows
    signed = key == "exp_avg"
    top, root = (127, relative.abs().sqrt()) if signed else (255, relative.clamp(min=0) ** 0.25)
    low = (root * top).floor().clamp(max=top - 1)
    level, upper, lower = (root * top), low + 1, low
    power = 2 if signed else 4
    # Probability of the upper level in the value's own units, not in those of its root.
    share = (level**power - lower**power) / (upper**power - lower**power)
    threshold = 0.5 if draw is None else (draw.to(torch.float32) + 0.5) / 65536
    code = low + (share > threshold)
    if signed:
        code = ZERO_CODE + code * relative.sign()
    elif key == "exp_avg_sq":
        code = torch.maximum(code, (relative > 0).to(code.dtype))
    return code.to(torch.uint8), scale


def decode_blocks(codes: Tensor, scale: Tensor, key: str) -> Tensor:
    """Values of `encode_blocks`.

    Args:
        codes: uint8, shape (rows, n).
        scale: float32, shape (rows, ceil(n / BLOCK)).
        key: As in `encode_blocks`.

    Returns:
        float32, shape (rows, n).
    """
    if key == "exp_avg":
        relative = (codes.to(torch.float32) - ZERO_CODE) / 127
        relative = relative * relative.abs()
    else:
        relative = (codes.to(torch.float32) / 255).square().square()
    return relative * scale.repeat_interleave(BLOCK, dim=1)[:, : codes.shape[1]]


def _blocks(values: Tensor) -> Tensor:
    rows, n = values.shape
    count = -(-n // BLOCK)
    return functional.pad(values, (0, count * BLOCK - n)).view(rows, count, BLOCK)

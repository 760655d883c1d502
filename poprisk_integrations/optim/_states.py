"""The states of a parameter: their formats, and how they follow what becomes of the parameter.

A moment is kept in float32 (or the parameter's own wider dtype), in bfloat16, or in 8-bit codes
with one float32 scale per block of a row.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from poprisk_integrations.distributed import is_dtensor, local_tensor
from poprisk_integrations.optim._options import kept_moments, needs_device_step
from poprisk_integrations.optim._rounding import to_bfloat16
from poprisk_integrations.optim._scalars import is_capturing

__all__ = [
    "BLOCK",
    "COUNTS",
    "Moment",
    "decode_blocks",
    "encode_blocks",
    "fit_state",
    "moment_format",
    "moment_of",
    "restored_moment",
    "saved_kind",
    "scale_shape",
    "state_keys",
]

COUNTS = ("step", "dev_step")
WIDE_DTYPES = (torch.float64, torch.complex64, torch.complex128)  # moments keep the parameter's
BLOCK = 64
ZERO_CODE = 128
# Below this size scales and rounding noise cost more than the bytes are worth.
MIN_CODED_NUMEL = 4096


@dataclass(slots=True)
class Moment:
    """One moment of one parameter, as the paths see it: this rank's shard."""

    key: str  # one of `MOMENTS`
    kind: str  # one of `STATE_FORMATS`; "float32" stands for any dtype that is worked on as it is
    tensors: tuple[Tensor, ...]  # what is stored: the values, or codes and scales

    def read(self) -> Tensor:
        """The values to work on: the state itself, or a float32 copy of a low-precision one."""
        tensor = self.tensors[0]
        if self.kind == "8bit":
            return decode_blocks(_rows(tensor), self.tensors[1], self.key).view(tensor.shape)
        return tensor.float() if self.kind == "bfloat16" else tensor

    def write(self, values: Tensor, draw: Tensor | None) -> None:
        """Store what `read` gave after work on it, with draws of `uniform16` or to nearest."""
        if self.kind == "8bit":
            draw = None if draw is None else _rows(draw)
            codes, scale = encode_blocks(_rows(values), self.key, draw)
            self.tensors[0].copy_(codes.view(values.shape))
            self.tensors[1].copy_(scale)
        elif self.kind == "bfloat16":
            self.tensors[0].copy_(to_bfloat16(values, draw))
        elif values is not self.tensors[0]:
            self.tensors[0].copy_(values)


def moment_of(state: dict[str, Tensor], key: str) -> Moment:
    """The moment kept in a parameter's state, whatever its format."""
    if key not in state:
        codes, scale = (local_tensor(state[name]) for name in state_keys(key, "8bit"))
        return Moment(key, "8bit", (codes, scale))
    tensor = local_tensor(state[key])
    if torch.is_complex(tensor):
        tensor = torch.view_as_real(tensor)
    return Moment(key, "bfloat16" if tensor.dtype == torch.bfloat16 else "float32", (tensor,))


def moment_format(param: Tensor, key: str, state_dtype: Any) -> str | torch.dtype:
    """How a moment of this parameter is stored: a format, or the parameter's own wide dtype.

    8-bit codes need a matrix of some size, judged on the GLOBAL shape, so that the precision does
    not depend on the world size; smaller tensors, vectors and embeddings of short rows stay
    float32.
    """
    wanted = state_dtype.get(key) if isinstance(state_dtype, dict) else state_dtype
    if param.dtype in WIDE_DTYPES:
        return param.dtype
    if wanted == "8bit":
        shape = param.shape
        big = param.numel() >= MIN_CODED_NUMEL and len(shape) > 1
        return "8bit" if big and shape[1:].numel() >= BLOCK else "float32"
    return wanted or "float32"


def state_keys(key: str, kind: str | torch.dtype) -> tuple[str, ...]:
    """Names under which a moment of that format is kept in the state."""
    # Codes have names of their own: read into a float32 tensor of the same name they would be
    # taken for values.
    return (f"{key}_codes", f"{key}_scale") if kind == "8bit" else (key,)


def saved_kind(state: dict[str, Any], key: str) -> str | None:
    """Whether a state holds a moment in codes ("8bit"), as values ("float32") or not at all."""
    if key in state:
        return "float32"
    return "8bit" if all(name in state for name in state_keys(key, "8bit")) else None


def scale_shape(param: Tensor) -> tuple[int, int]:
    """Shape of the scales of a parameter's codes: rows, and blocks within a row."""
    return param.shape[0], -(-param.shape[1:].numel() // BLOCK)


def fit_state(state: dict[str, Any], param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    """Complete a parameter's state, key by key: a loaded AdamW state has all but the noise.

    Parameters are moved, converted and resized behind an optimizer. Moments follow to another
    device and to a wider dtype. A noise variance of another shape starts anew, since those who
    resize a parameter know Adam's moments only; of exp_avg and exp_avg_sq that is an error, because
    compiled paths take the shape from the parameter.
    """
    shape, device, dtype = param.shape, param.device, param.dtype
    state_dtype = group["state_dtype"]
    on_device = needs_device_step(param, group)
    count_device = local_tensor(param).device if on_device else torch.device("cpu")
    moments = kept_moments(group)
    counts = COUNTS[: len(moments) - 1]  # `dev_step` counts for `exp_dev_sq`
    if len(counts) == 1 and "dev_step" in state:  # of another noise source, until now
        for name in ("dev_step", "exp_dev_sq", *state_keys("exp_dev_sq", "8bit")):
            state.pop(name, None)
    if not all(key in state for key in counts):
        if is_capturing(device):
            raise RuntimeError(
                "PopRiskAdamW has no state for a parameter while a CUDA graph is captured: each "
                "replay would start it anew. Run a step, or init_state(), before the capture."
            )
        if "step" in state:
            # Set by others past load_state_dict: DeepSpeed's universal checkpoint gives ONE step
            # tensor, wherever it lies, to all parameters, and each of them would count on it.
            step = torch.as_tensor(state["step"], dtype=torch.float32, device=count_device)
            state["step"] = step.detach().clone().reshape(())
        for key in counts:
            if key not in state:
                state[key] = torch.zeros((), dtype=torch.float32, device=count_device)
    for key in moments:
        held = state.get(key)
        if held is None:
            held = state.get(state_keys(key, "8bit")[0])
        if held is None:
            state.update(_new_moment(param, key, moment_format(param, key, state_dtype)))
        elif held.shape != shape:
            if key != "exp_dev_sq":
                raise RuntimeError(
                    f"PopRiskAdamW: {key} has the shape {tuple(held.shape)}, its parameter "
                    f"{tuple(shape)}. Whoever resizes a parameter must resize its exp_avg and "
                    "exp_avg_sq too, or remove its state; exp_dev_sq starts anew by itself."
                )
            state["dev_step"] = torch.zeros_like(state["dev_step"])
            _put(state, key, _new_moment(param, key, moment_format(param, key, state_dtype)))
        elif held.device != device or (held.dtype != dtype and dtype in WIDE_DTYPES):
            kind = moment_format(param, key, state_dtype)
            _put(state, key, restored_moment(state, key, kind, param))
            for name in counts:
                state[name] = state[name].to(count_device)
    return state


def _put(state: dict[str, Any], key: str, entries: dict[str, Tensor]) -> None:
    for name in (key, *state_keys(key, "8bit")):
        state.pop(name, None)
    state.update(entries)


def restored_moment(
    saved: dict[str, Any], key: str, kind: str | torch.dtype, param: Tensor
) -> dict[str, Tensor]:
    """A moment as the parameter needs it, from one of any format and device; none for none."""
    held = saved_kind(saved, key)
    if held is None:
        return {}
    # Copies, as torch makes by casting: the caller's dictionary must not be trained on.
    taken = {
        name: saved[name].detach().to(device=param.device, copy=True)
        for name in state_keys(key, held)
    }
    fresh = _new_moment(param, key, kind)
    if all(name in taken and taken[name].dtype == fresh[name].dtype for name in fresh):
        return taken
    moment_of(fresh, key).write(moment_of(taken, key).read(), None)
    return fresh


def _new_moment(param: Tensor, key: str, kind: str | torch.dtype) -> dict[str, Tensor]:
    """Zeros of a moment in a format of `moment_format`, sharded as the parameter."""
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
        # a strided shard of dimension 0 has another type, and rows in another order
        if not all(
            p.is_replicate() or (type(p).__name__ == "Shard" and p.dim == 0) for p in placements
        ):
            raise ValueError(
                f"Invalid state_dtype: '8bit' for a parameter with placements {placements}. "
                "Blocks must stay within rows: shard dimension 0 only, or use 'bfloat16'."
            )
        mesh = param.device_mesh  # type: ignore[attr-defined]
        scale = zeros(shape, dtype=torch.float32, device_mesh=mesh, placements=placements)
    names = state_keys(key, kind)
    return {names[0]: codes, names[1]: scale}


def encode_blocks(values: Tensor, key: str, draw: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes (uint8) and scales of matrices (..., rows, n); blocks never cross a row.

    With a = absmax of the block:
        exp_avg:                 x = sign * a * (c / 127)^2,  code 128 + sign * c
        exp_avg_sq, exp_dev_sq:  x = a * (c / 255)^4
    Powers spend the levels on small values, where a linear code is zero. Rounding goes to one of
    the two neighbouring levels, up with the probability that makes it unbiased (`draw` of
    `uniform16`; None rounds to nearest). Except: a positive exp_avg_sq is never coded 0, because
    the update divides by its root. A zero exp_dev_sq opens the gate, which is AdamW.
    """
    n = values.shape[-1]
    count = -(-n // BLOCK)
    padded = functional.pad(values, (0, count * BLOCK - n))
    blocks = padded.reshape(*values.shape[:-1], count, BLOCK)
    scale = blocks.abs().amax(-1)
    # An empty or all-zero block: any divisor will do.
    relative = blocks / scale.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
    relative = relative.flatten(-2)[..., :n]
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
    """Values (float32) of `encode_blocks`."""
    if key == "exp_avg":
        relative = (codes.to(torch.float32) - ZERO_CODE) / 127
        relative = relative * relative.abs()
    else:
        relative = (codes.to(torch.float32) / 255).square().square()
    return relative * scale.repeat_interleave(BLOCK, dim=-1)[..., : codes.shape[-1]]


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(tensor.shape[0], tensor.shape[1:].numel())

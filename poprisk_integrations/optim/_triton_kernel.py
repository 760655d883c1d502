"""The step of `PopRiskAdamW` as one Triton kernel over many tensors.

Imported on the first fused step only: importing the package must not import Triton.
"""

# Triton types kernels, from what they are compiled for.
# mypy: ignore-errors

import triton
import triton.language as tl

from poprisk_integrations.optim._scalars import COLUMNS

__all__ = ["BLOCK", "PARTIALS", "VECTOR_NUMEL", "poprisk_adamw_kernel"]

BLOCK = 1024  # elements of a program; with 4 warps 8 per thread, 16 bytes of bfloat16
VECTOR_NUMEL = 8  # 16 bytes of bfloat16
PARTIALS = 5  # sums per program: open, gate, ungated_sq, gated_sq, closed_zero_grad

# Kernels see globals only if they are constexpr.
_WIDTH = tl.constexpr(len(COLUMNS))
_KEEP = tl.constexpr(COLUMNS.index("keep"))
_GRAD_FACTOR = tl.constexpr(COLUMNS.index("grad_factor"))
_MEAN_SCALE = tl.constexpr(COLUMNS.index("mean_scale"))
_DEV_DECAY = tl.constexpr(COLUMNS.index("dev_decay"))
_DEV_WEIGHT = tl.constexpr(COLUMNS.index("dev_weight"))
_MEAN_WEIGHT = tl.constexpr(COLUMNS.index("mean_weight"))
_SQ_DECAY = tl.constexpr(COLUMNS.index("sq_decay"))
_SQ_WEIGHT = tl.constexpr(COLUMNS.index("sq_weight"))
_CORRECTION2 = tl.constexpr(COLUMNS.index("bias_correction2_sqrt"))
_NOISE_SCALE = tl.constexpr(COLUMNS.index("noise_scale"))
_EPS = tl.constexpr(COLUMNS.index("eps"))
_BOUNDARY = tl.constexpr(COLUMNS.index("boundary"))
_PENALTY = tl.constexpr(COLUMNS.index("penalty"))
_GATE_EPS = tl.constexpr(COLUMNS.index("gate_eps"))
_BLEND = tl.constexpr(COLUMNS.index("blend"))
_NOISE_IS_SIGNAL = tl.constexpr(COLUMNS.index("noise_is_signal"))
_STEP_SIZE = tl.constexpr(COLUMNS.index("step_size"))
_WEIGHT_DECAY = tl.constexpr(COLUMNS.index("weight_decay"))
_PARAM_SCALE = tl.constexpr(COLUMNS.index("param_scale"))
_PARTIALS = tl.constexpr(PARTIALS)
_VECTOR_NUMEL = tl.constexpr(VECTOR_NUMEL)
_TINY = tl.constexpr(2.0**-126)  # smallest normal float32


@triton.jit
def _hash32(x):
    # the same bits as `_rounding.hash32`
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _places(address, start, lane, TYPE: tl.constexpr, VECTOR: tl.constexpr):
    pointer = tl.load(address).to(tl.pointer_type(TYPE))
    if VECTOR:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + start + lane


@triton.jit
def _stored(x, draw, TYPE: tl.constexpr, ROUND: tl.constexpr):
    # x in the format it is kept in. ROUND: up with the probability of the rest, else to nearest.
    if TYPE == tl.float32:
        stored = x
    else:
        bits = x.to(tl.uint32, bitcast=True)
        if not ROUND:
            draw = 0x7FFF + ((bits >> 16) & 1)
        # the sum would carry a NaN over to zero
        bits = tl.where(x == x, (bits + draw) >> 16, 0x7FC0)
        stored = bits.to(tl.uint16).to(TYPE, bitcast=True)
    return stored


@triton.jit
def poprisk_adamw_kernel(
    table,  # int64 (tensors, 5): addresses of parameter, gradient, m, v, s
    layout,  # int64 (tensors, 3): elements, row in `rows` and `keys`, index of the first element
    blocks,  # int32 (programs, 2): tensor, and which block of it
    rows,  # float32 (parameters, columns), see `_scalars`
    keys,  # int32 (parameters, 2): `rounding_key`, and its hash for the second pair of streams
    partials,  # float32 (programs, 5), sums of the statistics; not touched unless COLLECT
    P: tl.constexpr,  # dtype of the parameters: float32 or bfloat16
    G: tl.constexpr,  # of the gradients
    M: tl.constexpr,  # of the first moments
    V: tl.constexpr,  # of the second moments
    S: tl.constexpr,  # of the noise variances
    GATE: tl.constexpr,  # "soft", "hard", "snr" or "none"
    HAS_S: tl.constexpr,  # else s is neither read nor written, and the noise read off m and v
    GATE_DECAY: tl.constexpr,
    HAS_GATE_EPS: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    ROUND_PARAM: tl.constexpr,  # stochastically, if bfloat16; bfloat16 states always are
    COLLECT: tl.constexpr,
    # Every address is a multiple of 16 bytes and every number of elements one of `VECTOR_NUMEL`,
    # so that no mask splits the 16 bytes that a thread moves at once.
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,  # elements of a program
):
    """One step on one block of one tensor per program, computed in float32."""
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(blocks + program * 2).to(tl.int64)
    start = tl.load(blocks + program * 2 + 1).to(tl.int64) * BLOCK
    numel = tl.load(layout + tensor * 3)
    index = tl.load(layout + tensor * 3 + 1)
    first = tl.load(layout + tensor * 3 + 2)
    row = rows + index * _WIDTH
    key = keys + index * 2
    partial = partials + program * _PARTIALS

    lane = tl.arange(0, BLOCK)
    p_places = _places(table + tensor * 5, start, lane, P, VECTOR)
    g_places = _places(table + tensor * 5 + 1, start, lane, G, VECTOR)
    m_places = _places(table + tensor * 5 + 2, start, lane, M, VECTOR)
    v_places = _places(table + tensor * 5 + 3, start, lane, V, VECTOR)
    s_places = _places(table + tensor * 5 + 4, start, lane, S, VECTOR)
    if VECTOR:
        numel = tl.multiple_of(numel, _VECTOR_NUMEL)
    inside = start + lane < numel
    p = tl.load(p_places, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(g_places, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(m_places, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(v_places, mask=inside, other=0.0).to(tl.float32)
    if HAS_S:
        s = tl.load(s_places, mask=inside, other=0.0).to(tl.float32)

    # zeros instead of a non-finite gradient, so that 0 * grad is 0
    keep = tl.broadcast_to(tl.load(row + _KEEP), [BLOCK]) > 0
    g = tl.where(keep, g * tl.load(row + _GRAD_FACTOR), 0.0)
    if MAXIMIZE:
        g = -g

    # update noise variance, before the mean moves
    if HAS_S:
        deviation = g - m * tl.load(row + _MEAN_SCALE)
        s = s * tl.load(row + _DEV_DECAY) + tl.load(row + _DEV_WEIGHT) * deviation * deviation

    # decay the first and second moment running average coefficient; the second form of the
    # interpolation is exact at weight 1
    weight = tl.load(row + _MEAN_WEIGHT)
    m = tl.where(weight < 0.5, m + weight * (g - m), g - (1.0 - weight) * (g - m))
    v = v * tl.load(row + _SQ_DECAY) + tl.load(row + _SQ_WEIGHT) * g * g
    denom = tl.div_rn(tl.sqrt_rn(v), tl.load(row + _CORRECTION2)) + tl.load(row + _EPS)

    # gate
    update = m
    if GATE != "none":
        mean_sq = m * m
        if HAS_S:
            noise = tl.where(tl.load(row + _NOISE_IS_SIGNAL) > 0, mean_sq, s)
        else:
            noise = tl.maximum(v * tl.load(row + _NOISE_SCALE) - mean_sq, 0.0)
        bound = tl.load(row + _BOUNDARY) * noise
        if GATE == "hard":
            gate = tl.where(mean_sq > bound, 1.0, 0.0)
        else:
            if GATE == "soft":
                signal = tl.maximum(mean_sq - bound, 0.0)
            else:
                signal = mean_sq
            total = signal + tl.load(row + _PENALTY) * noise
            if HAS_GATE_EPS:
                total += tl.load(row + _GATE_EPS)
            gate = tl.div_rn(signal, tl.maximum(total, _TINY))
        blend = tl.broadcast_to(tl.load(row + _BLEND), [BLOCK])
        gate = gate * blend + (1.0 - blend)
        update = m * gate

    # decoupled weight decay, ungated unless the group asks for it
    if GATE_DECAY:
        p = p * (1.0 - tl.load(row + _WEIGHT_DECAY) * gate)
    else:
        p = p * tl.load(row + _PARAM_SCALE)

    # apply
    p = p - tl.load(row + _STEP_SIZE) * tl.div_rn(update, denom)

    # round: draws of `_rounding.uniform16`: the streams of a hash are its halves
    place = (first + start).to(tl.uint32) + lane.to(tl.uint32)
    ROUND_M: tl.constexpr = M == tl.bfloat16
    ROUND_V: tl.constexpr = V == tl.bfloat16
    ROUND_S: tl.constexpr = S == tl.bfloat16
    word = place
    other_word = place
    if ROUND_PARAM or ROUND_S:
        word = _hash32(place ^ tl.load(key).to(tl.uint32, bitcast=True))
    if ROUND_M or ROUND_V:
        other_word = _hash32(place ^ tl.load(key + 1).to(tl.uint32, bitcast=True))

    # a skipped step leaves no trace, whatever the states hold
    mask = inside & keep
    tl.store(p_places, _stored(p, word & 0xFFFF, P, ROUND_PARAM), mask=mask)
    tl.store(m_places, _stored(m, other_word & 0xFFFF, M, ROUND_M), mask=mask)
    tl.store(v_places, _stored(v, other_word >> 16, V, ROUND_V), mask=mask)
    if HAS_S:
        tl.store(s_places, _stored(s, word >> 16, S, ROUND_S), mask=mask)

    if COLLECT:
        ratio = tl.where(inside, tl.div_rn(m, denom), 0.0)
        ungated_sq = ratio * ratio
        if GATE == "none":
            is_open = inside
            is_dead = inside & (numel < 0)
            gate = tl.where(inside, 1.0, 0.0)
        else:
            is_open = inside & ((mean_sq > bound) | (blend == 0.0))
            is_dead = inside & (mean_sq == 0.0) & (is_open == 0)
            gate = tl.where(inside, gate, 0.0)
        tl.store(partial, tl.reduce(tl.where(is_open, 1.0, 0.0), 0, _add))
        tl.store(partial + 1, tl.reduce(gate, 0, _add))
        tl.store(partial + 2, tl.reduce(ungated_sq, 0, _add))
        tl.store(partial + 3, tl.reduce(ungated_sq * gate * gate, 0, _add))
        tl.store(partial + 4, tl.reduce(tl.where(is_dead, 1.0, 0.0), 0, _add))

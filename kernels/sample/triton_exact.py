"""The arithmetic of `exact.py` for Triton, operation by operation.

The bits agree only if multiplications and additions are not fused, so every kernel that uses these functions is
launched with `enable_fp_fusion=False`. Divisions are `tl.div_rn`, because `/` is an approximation on some GPUs.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from .exact import GOLDEN_32, GOLDEN_64, LN2_HIGH, LN2_LOW, MARGIN
from .op import MASS_SCALE

_GOLDEN_32, _GOLDEN_64 = tl.constexpr(GOLDEN_32), tl.constexpr(GOLDEN_64)
_LN2_HIGH, _LN2_LOW = tl.constexpr(LN2_HIGH), tl.constexpr(LN2_LOW)
_MASS_SCALE = tl.constexpr(MASS_SCALE)
_MARGIN, _LOG2_E = tl.constexpr(MARGIN), tl.constexpr(math.log2(math.e))
_UNIT, _BELOW_ONE = tl.constexpr(2.0**-32), tl.constexpr(1 - 2.0**-24)


@triton.jit
def mass_of(distance):  # type: ignore[no-untyped-def]
    """Returns the mass of tokens, floor(exp(-distance) · 2^40), int64, for float32 distances of at least 0."""
    return (_exp32(-distance) * _MASS_SCALE).to(tl.int64)


@triton.jit
def _exp32(x):  # type: ignore[no-untyped-def]
    x = tl.maximum(x, -87.0)
    # Triton's floor flushes denormal numbers to 0 on NVIDIA GPUs. A sum with 0.5 is not denormal.
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    series = (1 / 5040) * r + (1 / 720)
    series = series * r + (1 / 120)
    series = series * r + (1 / 24)
    series = series * r + (1 / 6)
    series = series * r + 0.5
    series = (series * r + 1.0) * r + 1.0
    return series * ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _log32(x):  # type: ignore[no-untyped-def]
    bits = x.to(tl.int32, bitcast=True) - 0x3F3504F3
    n = (bits >> 23).to(tl.float32)
    m = ((bits & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
    z = tl.div_rn(m - 1.0, m + 1.0)
    square = z * z
    series = (1 / 9) * square + (1 / 7)
    series = series * square + (1 / 5)
    series = series * square + (1 / 3)
    series = series * square + 1.0
    return n * _LN2_HIGH + (n * _LN2_LOW + z * series * 2.0)


@triton.jit
def uniform(token_ids, key):  # type: ignore[no-untyped-def]
    """Returns the random numbers of tokens in (0, 1), float32, for the uint64 key of their row (`row_key`)."""
    low, high = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    bits = _mix32(_mix32(token_ids.to(tl.uint32) * _GOLDEN_32 + low) ^ high)
    return tl.minimum((bits.to(tl.float32) + 0.5) * _UNIT, _BELOW_ONE)


@triton.jit
def noise(v):  # type: ignore[no-untyped-def]
    """Returns the Gumbel noise of tokens, float32, for their numbers of `uniform`."""
    rest = 1.0 - v
    exact = -_log32(rest) * tl.div_rn(v, 1.0 - rest)
    return -_log32(tl.where(rest == 1.0, v, exact))


@triton.jit
def may_win(v, scaled, best):  # type: ignore[no-untyped-def]
    """Returns whether `scaled + noise(v)` may be at least `best`. The margin allows for an approximate exp2."""
    return v <= tl.exp2((scaled - best) * _LOG2_E) * _MARGIN


@triton.jit
def row_key(seed, position):  # type: ignore[no-untyped-def]
    """Returns a uint64 hash of an int64 seed and position."""
    return _mix64(_mix64(seed.to(tl.uint64) + _GOLDEN_64) + position.to(tl.uint64))


@triton.jit
def _mix32(h):  # type: ignore[no-untyped-def]
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def _mix64(h):  # type: ignore[no-untyped-def]
    h = (h ^ (h >> 33)) * 0xFF51AFD7ED558CCD
    h = (h ^ (h >> 33)) * 0xC4CEB9FE1A85EC53
    return h ^ (h >> 33)

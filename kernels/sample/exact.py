"""Arithmetic of `sample` that gives the same bits on every device.

Each function is a fixed sequence of IEEE float32 operations (add, subtract, multiply, divide, floor), whose rounding is
defined, or of integer operations modulo 2^32 or 2^64. `_cpu_numba.py` and `triton_exact.py` repeat them. A compiler
must not fuse multiplications with additions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LN2_HIGH, LN2_LOW = 0.693145751953125, 1.4286068203094172e-06
"""ln 2 in two parts: the first has 16 significant bits, so that its products with small integers are exact."""

GOLDEN_32, GOLDEN_64 = 0x9E3779B9, 0x9E3779B97F4A7C15
"""2^32 and 2^64 divided by the golden ratio. They are odd, and their multiples are spread evenly."""

SMALLEST_NOISE, LARGEST_NOISE = -2.8115408420562744, 22.873857498168945
"""The ends of the range of `noise`: that of the largest number of `uniform`, 1 - 2^-24, and of the smallest, 2^-33."""

MARGIN = 1.001
"""Factor on the bound of `may_win`, much more than the rounding errors of both sides, which are below 1 + 2e-5."""

_MASK_32 = 0xFFFFFFFF


def exp32(x: Tensor) -> Tensor:
    """Returns exp(x) for float32 x <= 0 with a relative error of 2e-7. Below -87 it returns exp(-87)."""
    x = x.clamp(min=-87.0)
    n = torch.floor(x * math.log2(math.e) + 0.5)
    r = x - n * LN2_HIGH - n * LN2_LOW
    series = torch.full_like(r, 1 / 5040)
    for factorial in (720, 120, 24, 6, 2, 1, 1):
        series = series * r + 1 / factorial
    return series * ((n.int() + 127) << 23).view(torch.float32)


def log32(x: Tensor) -> Tensor:
    """Returns log(x) for normal float32 x > 0 with a relative error of 2e-7, near 1 as well.

    With x = 2^n · m and m between sqrt(1/2) and sqrt(2): log(x) = n · ln 2 + 2 atanh(z), z = (m - 1) / (m + 1).
    """
    bits = x.view(torch.int32) - 0x3F3504F3  # the bits of sqrt(1/2)
    n = (bits >> 23).float()
    m = ((bits & 0x7FFFFF) + 0x3F3504F3).view(torch.float32)
    z = (m - 1) / (m + 1)
    square = z * z
    series = torch.full_like(z, 1 / 9)
    for odd in (7, 5, 3, 1):
        series = series * square + 1 / odd
    return n * LN2_HIGH + (n * LN2_LOW + z * series * 2)


def gumbel(seeds: Tensor, positions: Tensor, num_tokens: int, first_id: int = 0) -> Tensor:
    """Returns the Gumbel noise of tokens at a position of a seed, `[num_rows, num_tokens]` float32.

    The noise is -log(-log(1 - v)) for v uniform in (0, 1) from 32 random bits. The largest noise, which decides a draw,
    comes from the smallest v, where float32 has the finest resolution.
    """
    return noise(uniform(random_bits(seeds, positions, num_tokens, first_id)))


def uniform(bits: Tensor) -> Tensor:
    """Returns numbers in (0, 1), float32, for 32 random bits each, int64."""
    return ((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)


def noise(v: Tensor) -> Tensor:
    """Returns -log(-log(1 - v)) for float32 numbers of `uniform`."""
    rest = 1 - v
    # -log(1 - v), although 1 - v has been rounded: the rounding error cancels in v / (1 - rest).
    exponential = torch.where(rest == 1, v, -log32(rest) * (v / (1 - rest)))
    return -log32(exponential)


def may_win(v: Tensor, scaled: Tensor, best: Tensor) -> Tensor:
    """Returns whether `scaled + noise(v)` may be at least `best`: false only if it is certainly less, bool.

    The sum reaches `best` if -log(1 - v) <= exp(scaled - best), and v is less than -log(1 - v).

    Args:
        v: Numbers of `uniform`, float32.
        scaled: Scaled logits, float32, at most 0.
        best: Scores, float32, at least `SMALLEST_NOISE`.
    """
    return v <= torch.exp2((scaled - best) * math.log2(math.e)) * MARGIN


def random_bits(seeds: Tensor, positions: Tensor, num_tokens: int, first_id: int = 0) -> Tensor:
    """Returns 32 random bits for tokens at a position of a seed, `[num_rows, num_tokens]` int64."""
    keys = row_keys(seeds, positions).unsqueeze(-1)
    token_ids = torch.arange(first_id, first_id + num_tokens, device=seeds.device)
    hashed = _mix32((token_ids * GOLDEN_32 + keys) & _MASK_32)
    return _mix32(hashed ^ _shift(keys, 32))


def row_keys(seeds: Tensor, positions: Tensor) -> Tensor:
    """Returns a 64-bit hash of seed and position, `[num_rows]` int64."""
    return _mix64(_mix64(seeds + _signed(GOLDEN_64)) + positions)


def _mix32(h: Tensor) -> Tensor:
    """Applies the 32-bit finaliser of MurmurHash3 (Austin Appleby, public domain) to int64 tensors in `[0, 2^32)`."""
    h = ((h ^ h >> 16) * 0x85EBCA6B) & _MASK_32
    h = ((h ^ h >> 13) * 0xC2B2AE35) & _MASK_32
    return h ^ h >> 16


def _mix64(h: Tensor) -> Tensor:
    """Applies the 64-bit finaliser of MurmurHash3 to int64 tensors."""
    h = (h ^ _shift(h, 33)) * _signed(0xFF51AFD7ED558CCD)
    h = (h ^ _shift(h, 33)) * _signed(0xC4CEB9FE1A85EC53)
    return h ^ _shift(h, 33)


def _shift(h: Tensor, n: int) -> Tensor:
    """Shifts int64 numbers to the right by n bits and fills with zeros, where `>>` would fill with the sign."""
    return (h >> n) & ((1 << (64 - n)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value

"""Rotary position embedding on the CPU: one pass in numba instead of a dozen small operators.

float16 stays with the plain body: numba cannot write it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .._numba import Array, Scalar, as_storage, bits_from_float, float_from_bits, jit
from .op import rotary


@rotary.register("cpu")
def rotary_cpu(positions: Tensor, query: Tensor, key: Tensor, cos_sin: Tensor) -> None:
    """Runs `rotary` in numba, on the calling thread: it moves little memory."""
    if query.dtype == torch.float16:
        rotary.plain(positions, query, key, cos_sin)
        return
    rotate = _rotate_bfloat16 if query.dtype == torch.bfloat16 else _rotate_float32
    for heads in (query, key):
        rotate(positions.numpy(), as_storage(heads), cos_sin.numpy())


@jit()
def _rotate_float32(positions: Array, heads: Array, cos_sin: Array) -> None:
    half = cos_sin.shape[1] // 2
    for token in range(heads.shape[0]):
        row = cos_sin[positions[token]]
        for head in range(heads.shape[1]):
            for d in range(half):
                first, second = heads[token, head, d], heads[token, head, d + half]
                heads[token, head, d] = first * row[d] - second * row[d + half]
                heads[token, head, d + half] = second * row[d] + first * row[d + half]


@jit()
def _rotate_bfloat16(positions: Array, heads: Array, cos_sin: Array) -> None:
    half = cos_sin.shape[1] // 2
    for token in range(heads.shape[0]):
        row = cos_sin[positions[token]]
        for head in range(heads.shape[1]):
            for d in range(half):
                first, second = _widen(heads[token, head, d]), _widen(heads[token, head, d + half])
                heads[token, head, d] = _narrow(first * row[d] - second * row[d + half])
                heads[token, head, d + half] = _narrow(second * row[d] + first * row[d + half])


@jit()
def _widen(bits: Scalar) -> Scalar:
    """Reads the bits of a bfloat16 as float32."""
    return float_from_bits(np.uint32(bits) << np.uint32(16))


@jit()
def _narrow(x: Scalar) -> Scalar:
    """Rounds a float32 to bfloat16, ties to even, and returns its bits. NaN stays NaN."""
    bits = bits_from_float(x)
    rounded = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    return np.uint16((rounded if x == x else np.uint32(0x7FC00000)) >> np.uint32(16))

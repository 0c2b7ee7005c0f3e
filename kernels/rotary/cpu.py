"""Rotary position embedding on the CPU: one pass in numba instead of a dozen small operators."""

from __future__ import annotations

from torch import Tensor

from .._numba import Array, as_storage, jit
from .._storage import store, widen
from .op import rotary


@rotary.register("cpu")
def rotary_cpu(positions: Tensor, query: Tensor, key: Tensor, cos_sin: Tensor) -> None:
    """Runs `rotary` in numba, on the calling thread: it moves little memory."""
    for heads in (query, key):
        _rotate(positions.numpy(), as_storage(heads), cos_sin.numpy())


@jit()
def _rotate(positions: Array, heads: Array, cos_sin: Array) -> None:
    half = cos_sin.shape[1] // 2
    for token in range(heads.shape[0]):
        row = cos_sin[positions[token]]
        for head in range(heads.shape[1]):
            x = heads[token, head]
            for d in range(half):
                first, second = widen(x[d]), widen(x[d + half])
                store(x, d, first * row[d] - second * row[d + half])
                store(x, d + half, second * row[d] + first * row[d + half])

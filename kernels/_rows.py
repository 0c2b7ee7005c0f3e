"""Helpers of the Triton kernels over rows: tensors as rows, and the number of rows and threads of a program."""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor

from ._triton import Target

MAX_ROW = 16_384
"""The longest row that a program holds in registers. At twice that length kernels spill registers."""

_MIN_TILE = 1024
_MAX_ROWS = 16
_ELEMENTS_PER_THREAD = 16
_MIN_THREADS = 128


def as_rows(x: Tensor) -> Tensor:
    """Returns x as `[num_rows, size]` with contiguous rows, as a view if its strides allow that."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def row_tile(size: int) -> dict[str, int]:
    """Returns the tile of a program as ROWS and BLOCK: one row of `size` numbers, or several short rows."""
    block = triton.next_power_of_2(size)
    return {"ROWS": max(1, min(_MAX_ROWS, _MIN_TILE // block)), "BLOCK": block}


def long_row_tile(size: int, most: int = MAX_ROW) -> dict[str, int]:
    """Returns the tile of a program for one row of any length, of which it holds up to `most` numbers."""
    return {"ROWS": 1, "BLOCK": min(most, triton.next_power_of_2(size))}


def row_options(tile: dict[str, int], target: Target) -> dict[str, Any]:
    """Returns the options to compile and launch a tile, with 16 elements per thread and 128 to 1,024 threads."""
    num_threads = max(_MIN_THREADS, tile["ROWS"] * tile["BLOCK"] // _ELEMENTS_PER_THREAD)
    return {"num_warps": num_threads // target.warp_size, "enable_fp_fusion": True}


LISTED_SIZES = (1, 2048, 4096, 8192, MAX_ROW)
"""The row sizes in lists of specialisations: the shortest, the longest, and one for every number of threads."""

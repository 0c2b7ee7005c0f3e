"""Tiles, warps and splits of the attention kernels, as functions of the shapes and the GPU alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton

from .._fp8 import has_e4m3
from .._triton import Target

MIN_HEAD_DIM, MAX_HEAD_DIM = 8, 256
MAX_SLOTS = 64
"""The most partial results of a row. The merge kernel holds all of them in registers."""
MERGE_SIZES = (4, 16, MAX_SLOTS)
"""Partial results for which the merge kernel is compiled. Their number changes with the size of the batch."""
_PROGRAMS_PER_PROCESSOR = 8
"""The number of programs of a decode grid. About three run at once, and the others even out different lengths."""
PREFIX_PROGRAMS_PER_PROCESSOR = 1
"""The number of programs of a prefix grid. One runs at a time, and all have equal work."""
_MIN_ROWS = 16
"""The rows of a matrix instruction. Decode is bound by memory, so empty rows cost no time."""
_DECODE_TILE_BYTES = 16 * 1024


@dataclass(frozen=True, slots=True)
class Config:
    """The tile and the options with which a kernel is compiled.

    Attributes:
        block_m: Rows of a tile: queries times heads.
        block_n: Keys of a tile.
        num_warps: Warps of a program.
        num_stages: Tiles of keys that are in flight at once, the current one included.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def tile(self) -> dict[str, int]:
        """Returns the sizes of the tile as compile-time arguments of a kernel, BLOCK_M and BLOCK_N."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n}

    def options(self) -> dict[str, int]:
        """Returns the options of a launch: num_warps, num_stages and enable_fp_fusion."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


MERGE_CONFIG = Config(block_m=1, block_n=1, num_warps=4, num_stages=1)
"""The merge kernel has no tile of keys."""


def prefill_config(
    target: Target,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    head_dim: int,
    edited: bool,
    deterministic: bool = False,
) -> Config:
    """Returns the tiles of the prefill kernel: the largest that do not spill registers.

    The tiles are the same for all calls of a model, and `deterministic` relies on that. With `deterministic`,
    tiles may have fewer rows, because the prefill kernel then computes decodes too, which fill only a few rows of a
    tile.

    Args:
        target: The GPU.
        dtype: The dtype of the query.
        cache_dtype: The dtype of the cache.
        head_dim: The size of a head.
        edited: Whether scores are edited before the softmax, which takes registers.
        deterministic: Whether the prefill kernel computes decodes too.
    """
    is_large = head_dim > 128
    if dtype == torch.float32:
        config = _float32_config(target, cache_dtype, head_dim)
        has_few_registers = is_large and cache_dtype != dtype and has_e4m3(target)
        return replace(config, num_warps=4) if has_few_registers else config
    if target.warp_size == 64:
        return Config(128, 16, 4, 1) if is_large else Config(64, 16, 4, 1)
    if has_e4m3(target):
        if is_large:
            return Config(32 if cache_dtype.itemsize == 1 else 64, 32, 8, 3)
        block_n = 32 if edited else 64
        return Config(64, block_n, 4, 3) if deterministic else Config(128, block_n, 8, 3)
    if cache_dtype.itemsize == 1:  # converting byte by byte takes registers
        return Config(32, 32, 8, 1) if is_large else Config(32, 16, 4, 3)
    return Config(64, 32, 8, 3) if is_large else Config(64, 64, 8, 3)


def prefix_config(target: Target, dtype: torch.dtype, cache_dtype: torch.dtype, head_dim: int, edited: bool) -> Config:
    """Returns the tiles of the prefix kernel: those of the prefill kernel, and fewer warps where it would spill."""
    if dtype == torch.float32:
        return _float32_config(target, cache_dtype, head_dim)
    config = prefill_config(target, dtype, cache_dtype, head_dim, edited)
    is_narrow = head_dim > 128 and cache_dtype != dtype and has_e4m3(target)
    return replace(config, num_warps=4) if is_narrow else config


def decode_config(
    target: Target, dtype: torch.dtype, cache_dtype: torch.dtype, head_dim: int, edited: bool, group: int
) -> Config:
    """Returns the tiles of the decode kernel: the heads of a group times keys of about 16 KiB in the query's dtype.

    Args:
        target: The GPU.
        dtype: The dtype of the query.
        cache_dtype: The dtype of the cache.
        head_dim: The size of a head.
        edited: As in `prefill_config`.
        group: Query heads per KV head.
    """
    if dtype == torch.float32:
        return _float32_config(target, cache_dtype, head_dim)
    if target.warp_size == 64:
        return Config(_MIN_ROWS, 32, 4, 1)
    is_small = padded(head_dim) <= 64 or (head_dim <= 128 and cache_dtype == dtype)
    block_m = 32 if group > _MIN_ROWS and is_small else _MIN_ROWS
    keys = _DECODE_TILE_BYTES // (padded(head_dim) * dtype.itemsize)
    if edited and block_m > _MIN_ROWS and head_dim > 64:
        keys //= 2
    # The conversion takes registers; edited scores of the largest heads take more than 8 warps have for each thread.
    has_few_registers = edited and head_dim > 128
    num_warps = 8 if cache_dtype != dtype and has_e4m3(target) and not has_few_registers else 4
    max_scores = 2048 if padded(head_dim) >= 64 else 1024
    return Config(block_m, min(keys, max_scores // block_m), num_warps, 3)


def _float32_config(target: Target, cache_dtype: torch.dtype, head_dim: int) -> Config:
    """Returns small tiles, because full float32 products are computed in registers and not by matrix instructions."""
    if target.warp_size == 64:
        return Config(_MIN_ROWS, 16, 8, 2)
    num_stages = 2 if head_dim >= 128 and cache_dtype == torch.float32 else 1
    # With 16 warps, a thread has too few registers for the largest heads.
    return Config(_MIN_ROWS, 16, 16 if 64 <= head_dim <= 128 else 8, num_stages)


def num_splits(
    target: Target,
    num_programs: int,
    max_keys: int,
    block_n: int,
    limit: int = MAX_SLOTS,
    programs_per_processor: int = _PROGRAMS_PER_PROCESSOR,
) -> int:
    """Returns the number of programs that the keys of a row are split over, so that the grid fills the GPU.

    The number does not depend on the lengths of sequences, which only the GPU knows, so it is valid whenever a CUDA
    graph is replayed.

    Args:
        target: The GPU.
        num_programs: The number of programs of the grid without splits.
        max_keys: The largest number of keys that a sequence can have.
        block_n: Keys of a tile.
        limit: The most splits.
        programs_per_processor: The number of programs of the grid for each multiprocessor.
    """
    wanted = triton.cdiv(programs_per_processor * target.num_processors, num_programs)
    return max(1, min(wanted, triton.cdiv(max_keys, block_n), limit))


def padded(head_dim: int) -> int:
    """Returns the number of columns of a tile: a power of two, and at least the 16 of a matrix instruction."""
    return max(16, triton.next_power_of_2(head_dim))

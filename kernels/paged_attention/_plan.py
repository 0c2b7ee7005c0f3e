"""`plan_launches`: the kernels of a call of attention, with all of their arguments but tensors.

A plan depends only on the `Call`, which is the same for all layers of a step. So it is made once a step, and the other
layers pay for a lookup: choosing the kernels takes the host longer than launching them.

Sequences with one query go to the decode kernel, after the prefix kernel if they share their first blocks. All others
go to the prefill kernel.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton

from .._triton import MAX_PLANS, Launch, Layout, Target
from ._configs import (
    MAX_HEAD_DIM,
    MAX_SLOTS,
    MERGE_CONFIG,
    MERGE_SIZES,
    MIN_HEAD_DIM,
    PREFIX_PROGRAMS_PER_PROCESSOR,
    Config,
    decode_config,
    num_splits,
    padded,
    prefill_config,
    prefix_config,
)
from ._decode import decode_kernel, merge_kernel, prefix_kernel
from ._prefill import prefill_kernel

_LOG2_E = 1.4426950408889634
_NO_WINDOW = 2**31 - 1


NamedLaunch = tuple[tuple[str, ...], Launch]
"""The names of the tensors of a launch, and the launch."""

MAX_DECODES = 65_535
"""The most programs of a grid in its last dimension, which is that of the sequences in a decode grid."""


class Call(NamedTuple):
    """All that the kernels of a call depend on: the layouts of its tensors, and its other arguments.

    Attributes:
        target: The GPU.
        query: Layout of the query, `[num_tokens, num_heads, head_dim]`.
        k_cache: Layout of the cache of keys, `[num_blocks, num_kv_heads, block_size, head_dim]`.
        v_cache: Layout of the cache of values.
        block_tables: Layout of the block tables, `[num_seqs, max_blocks]`.
        scale: As in `paged_attention`, like the next five.
        softcap: Bound of the scores.
        window: Size of the window.
        causal: Whether attention is causal.
        num_decodes: Number of sequences with one query.
        deterministic: Whether no bit of a row may depend on other rows.
        has_sinks: Whether sinks are given.
        has_slopes: Whether slopes of ALiBi are given.
        has_shared: Whether a number of shared blocks is given.
        has_scales: Whether scales of an 8-bit cache are given.
    """

    target: Target
    query: Layout
    k_cache: Layout
    v_cache: Layout
    block_tables: Layout
    scale: float
    softcap: float
    window: int
    causal: bool
    num_decodes: int
    deterministic: bool
    has_sinks: bool
    has_slopes: bool
    has_shared: bool
    has_scales: bool

    @property
    def edited(self) -> bool:
        """Whether scores are edited before the softmax."""
        return self.softcap > 0 or self.has_slopes

    @property
    def group(self) -> int:
        """Number of query heads of a KV head."""
        return self.query.shape[1] // self.k_cache.shape[1]


@dataclass(frozen=True, slots=True)
class Plan:
    """The launches of a call.

    Attributes:
        launches: The kernels in order, each with the names of the tensors that it takes.
        num_slots: Number of partial results of each row that is decoded; 1 if no workspace is needed.
    """

    launches: tuple[NamedLaunch, ...]
    num_slots: int


@functools.lru_cache(MAX_PLANS)
def plan_launches(call: Call) -> Plan:
    """Chooses the kernels of a call and their arguments.

    Raises:
        ValueError: The kernels do not support the heads, the dtypes or the layout of the cache.
    """
    _check(call)
    if call.num_decodes > MAX_DECODES:
        raise ValueError(f"paged_attention: {call.num_decodes} decodes in a step; the grid takes at most {MAX_DECODES}")
    num_decodes = 0 if call.deterministic else call.num_decodes
    launches, num_slots = _decode(call, num_decodes) if num_decodes else ([], 1)
    if call.query.shape[0] > num_decodes:
        launches.append(_prefill(call, num_decodes))
    return Plan(tuple(launches), num_slots)


def _prefill(call: Call, first_seq: int) -> NamedLaunch:
    """Plans the prefill kernel for sequences from `first_seq` on. Each sequence before it has one query row."""
    num_seqs = call.block_tables.shape[0]
    config = prefill_config(*_sizes(call), deterministic=call.deterministic)
    num_tiles = (call.query.shape[0] - first_seq) // _rows_per_tile(call, config) + num_seqs - first_seq
    own = {"first_seq": first_seq, "num_seqs": num_seqs}
    return _launch(call, prefill_kernel, (num_tiles, _head_tiles(call, config)), config, own)


def _decode(call: Call, num_seqs: int) -> tuple[list[NamedLaunch], int]:
    """Plans the kernels for the first `num_seqs` sequences: prefix (if shared), decode, and merge (if split).

    Returns:
        The launches, and the number of slots of a row.
    """
    has_prefix = call.has_shared and not call.window
    config, of_prefix = decode_config(*_sizes(call), call.group), prefix_config(*_sizes(call))
    limit = MAX_SLOTS // 2 if has_prefix else MAX_SLOTS
    grid, prefix_grid = _split_grid(call, config, num_seqs, limit=limit), (0, 0, 0)
    if has_prefix:
        num_tiles = triton.cdiv(num_seqs, _rows_per_tile(call, of_prefix))
        share = {"limit": limit, "programs_per_processor": PREFIX_PROGRAMS_PER_PROCESSOR}
        prefix_grid = _split_grid(call, of_prefix, num_tiles, **share)
    num_slots = prefix_grid[2] + grid[2]
    own = {"num_slots": num_slots, "num_seqs": num_seqs, "first_slot": prefix_grid[2], "has_shared": int(has_prefix)}
    launches = [_launch(call, prefix_kernel, prefix_grid, of_prefix, own)] if has_prefix else []
    launches.append(_launch(call, decode_kernel, grid[::-1], config, own))
    if num_slots > 1:
        own["MAX_SLOTS"] = next(most for most in MERGE_SIZES if num_slots <= most)
        launches.append(_launch(call, merge_kernel, (num_seqs * call.query.shape[1],), MERGE_CONFIG, own))
    return launches, num_slots


def _launch(call: Call, kernel: Any, grid: tuple[int, ...], config: Config, own: dict[str, Any]) -> NamedLaunch:
    """Plans a kernel with the values that its signature names, of the call, the tile and `own`."""
    values, names = _values(call) | config.tile() | own, kernel.arg_names
    tensors = tuple(name for name in names if name.endswith("_ptr"))
    assert names[: len(tensors)] == list(tensors), "the tensors are the first arguments of each kernel"
    return tensors, Launch(kernel, grid, tuple(values[name] for name in names[len(tensors) :]), config.options())


def _values(call: Call) -> dict[str, Any]:
    """Returns the arguments of all kernels that follow from the call alone."""
    head_dim = call.query.shape[2]
    return {
        "q_stride": call.query.strides[0],
        "block_stride": call.k_cache.strides[0],
        "table_stride": call.block_tables.strides[0],
        "num_heads": call.query.shape[1],
        "group": call.group,
        "window": call.window or _NO_WINDOW,
        "score_scale": _LOG2_E * (2 * call.scale / call.softcap if call.softcap else call.scale),
        "cap": _LOG2_E * call.softcap,
        "has_sinks": int(call.has_sinks),
        "has_slopes": int(call.has_slopes),
        "has_scales": int(call.has_scales),
        "deterministic": int(call.deterministic),
        "HEAD_DIM": head_dim,
        "BLOCK_SIZE": call.k_cache.shape[2],
        "BLOCK_D": padded(head_dim),
        "EDITED": call.edited,
        "CAUSAL": call.causal,
    }


def _sizes(call: Call) -> tuple[Target, torch.dtype, torch.dtype, int, bool]:
    """Returns the arguments with which `prefill_config` and `decode_config` begin."""
    return call.target, call.query.dtype, call.k_cache.dtype, call.query.shape[2], call.edited


def _split_grid(call: Call, config: Config, num_tiles: int, **share: int) -> tuple[int, int, int]:
    """Returns the grid of a kernel that splits keys: (num_tiles, tiles of heads, splits); `share`: see `num_splits`."""
    max_keys = call.block_tables.shape[1] * call.k_cache.shape[2]
    head_tiles = _head_tiles(call, config)
    splits = num_splits(call.target, num_tiles * head_tiles, max_keys, config.block_n, **share)
    return num_tiles, head_tiles, splits


def _head_tiles(call: Call, config: Config) -> int:
    """Returns the number of tiles for the heads of one query: one per KV head, or more if a group is wider."""
    return call.k_cache.shape[1] * triton.cdiv(call.group, config.block_m)


def _rows_per_tile(call: Call, config: Config) -> int:
    """Returns the number of queries of a tile, where each query takes the heads of a group."""
    return config.block_m // min(call.group, config.block_m)


def _check(call: Call) -> None:
    """Raises `ValueError` unless the kernels support the shapes, dtypes and strides of a call."""
    _, num_heads, head_dim = call.query.shape
    _, num_kv_heads, block_size, cached_dim = call.k_cache.shape
    sizes_fit = MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM and cached_dim == head_dim
    if not sizes_fit or num_heads % num_kv_heads:
        raise ValueError(
            f"paged_attention: {num_heads} query heads of {head_dim} over {num_kv_heads} KV heads of {cached_dim}; "
            f"the sizes must be equal, {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, and the number of KV heads must divide that "
            f"of query heads"
        )
    if call.k_cache.dtype not in (call.query.dtype, torch.float8_e4m3fn):
        raise ValueError(
            f"paged_attention: a query in {call.query.dtype} over a cache in {call.k_cache.dtype}; "
            f"the cache must be in the dtype of the query or in torch.float8_e4m3fn"
        )
    if call.has_scales and call.k_cache.dtype != torch.float8_e4m3fn:
        raise ValueError(
            f"paged_attention: kv_scales are given for a cache in {call.k_cache.dtype}; only float8_e4m3fn has scales"
        )
    strides = (block_size * head_dim, head_dim, 1)
    if call.k_cache.strides[1:] != strides or call.v_cache != call.k_cache:
        raise ValueError(
            f"paged_attention: caches of strides {list(call.k_cache.strides)} and {list(call.v_cache.strides)}; "
            f"they must be alike and contiguous within a block: [..., {', '.join(map(str, strides))}]"
        )

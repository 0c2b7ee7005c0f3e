"""Attention over latents on the GPU, in Triton: the launches of a call, and the tiles of its kernels.

Sequences with one query go to the decode kernel, which splits their latents over programs; all others to the prefill
kernel. Nothing is read on the host.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .._triton import MAX_PLANS, TORCH_TO_TRITON, Launch, Layout, Specialisation, Target, current_target
from ..paged_attention._configs import MERGE_CONFIG, MERGE_SIZES, Config, num_splits, padded
from ..paged_attention._decode import merge_kernel
from ..paged_attention._plan import MAX_DECODES
from ._kernels import latent_decode_kernel, latent_prefill_kernel
from .op import latent_attention

_LOG2_E = 1.4426950408889634
MAX_RANK, MAX_ROPE_DIM = 512, 64
"""The largest latents: those of DeepSeek-V2 and V3. A row of that size fills the registers of a thread."""
MAX_SPLITS = 16
"""Most programs that share the latents of a sequence. Their partial results are float32 rows of `rank` numbers."""


class Call(NamedTuple):
    """All that the kernels of a call depend on: the layouts of its tensors, and its other arguments."""

    target: Target
    query: Layout
    cache: Layout
    block_tables: Layout
    scale: float
    rank: int
    num_decodes: int


@latent_attention.register("cuda")
def latent_attention_triton(
    query: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    scale: float,
    rank: int,
    *,
    num_decodes: int = 0,
) -> Tensor:
    """Runs `latent_attention` in one to three kernels.

    Raises:
        ValueError: The kernels do not support the sizes, the dtypes or the layout of the cache.
    """
    if query.stride(2) != 1 or query.stride(1) != query.shape[2]:
        query = query.contiguous()
    layouts = Layout.of(query), Layout.of(cache), Layout.of(block_tables)
    launches, num_slots = plan_launches(Call(current_target(), *layouts, scale, rank, num_decodes))
    out = torch.empty((*query.shape[:2], rank), dtype=query.dtype, device=query.device)
    sums = stats = seq_lens.view(torch.float32)  # A pointer of the right type that is not read.
    if num_slots > 1:
        slots = (num_decodes, query.shape[1], num_slots)
        sums = torch.empty((*slots, rank), dtype=torch.float32, device=query.device)
        stats = torch.empty((*slots, 2), dtype=torch.float32, device=query.device)
    tensors = {"q_ptr": query, "cache_ptr": cache, "tables_ptr": block_tables, "seq_lens_ptr": seq_lens}
    tensors |= {"starts_ptr": query_start_loc, "out_ptr": out, "sums_ptr": sums, "stats_ptr": stats}
    for launch in launches:
        launch.run(*[tensors[name] for name in launch.kernel.arg_names if name.endswith("_ptr")])
    return out


@functools.lru_cache(MAX_PLANS)
def plan_launches(call: Call) -> tuple[tuple[Launch, ...], int]:
    """Returns the kernels of a call with their arguments, and the number of partial results of a decoded row.

    Raises:
        ValueError: The kernels do not support the sizes, the dtypes or the layout of the cache.
    """
    _check(call)
    num_tokens, num_heads, _ = call.query.shape
    num_seqs, num_slots, launches = call.block_tables.shape[0], 1, []
    dtype, max_keys = call.query.dtype, call.block_tables.shape[1] * call.cache.shape[2]
    if call.num_decodes:
        config = decode_config(call.target, dtype)
        head_tiles = triton.cdiv(num_heads, config.block_m)
        programs = call.num_decodes * head_tiles
        num_slots = num_splits(call.target, programs, max_keys, config.block_n, limit=MAX_SPLITS)
        grid: tuple[int, ...] = (num_slots, head_tiles, call.num_decodes)
        launches.append(_launch(call, latent_decode_kernel, grid, config, {"num_slots": num_slots}))
    if num_slots > 1:
        sizes = {"num_slots": num_slots, "MAX_SLOTS": next(most for most in MERGE_SIZES if num_slots <= most)}
        launches.append(_launch(call, merge_kernel, (call.num_decodes * num_heads,), MERGE_CONFIG, sizes))
    if num_tokens > call.num_decodes:
        config = prefill_config(call.target, dtype)
        per_tile = config.block_m // min(num_heads, config.block_m)
        num_tiles = (num_tokens - call.num_decodes) // per_tile + num_seqs - call.num_decodes
        grid = (num_tiles, triton.cdiv(num_heads, config.block_m))
        sizes = {"first_seq": call.num_decodes, "num_seqs": num_seqs}
        launches.append(_launch(call, latent_prefill_kernel, grid, config, sizes))
    return tuple(launches), num_slots


def decode_config(target: Target, dtype: torch.dtype) -> Config:
    """Returns the tiles of the decode kernel, of 16 heads."""
    is_amd = target.warp_size == 64
    if dtype == torch.float32:  # Products are computed in registers, so tiles are small.
        return Config(16, 16, 4 if is_amd else 8, 1)
    return Config(16, 16, 8, 1) if is_amd else Config(16, 32, 8, 3)


def prefill_config(target: Target, dtype: torch.dtype) -> Config:
    """Returns the tiles of the prefill kernel: as many rows as do not spill registers."""
    config, is_amd = decode_config(target, dtype), target.warp_size == 64
    if dtype == torch.float32:
        return config if is_amd else replace(config, num_warps=16)
    return replace(config, block_m=32)


def _launch(call: Call, kernel: Any, grid: tuple[int, ...], config: Config, own: dict[str, int]) -> Launch:
    """Plans a kernel with the values that its signature names, of the call, the tile and `own`."""
    values: dict[str, Any] = {
        "q_stride": call.query.strides[0],
        "block_stride": call.cache.strides[0],
        "table_stride": call.block_tables.strides[0],
        "num_heads": call.query.shape[1],
        "score_scale": _LOG2_E * call.scale,
        **_sizes(call.rank, call.query.shape[2] - call.rank, call.cache.shape[2]),
        **config.tile(),
        **own,
    }
    names = [name for name in kernel.arg_names if not name.endswith("_ptr")]
    return Launch(kernel, grid, tuple(values[name] for name in names), config.options())


def _sizes(rank: int, rope_dim: int, block_size: int) -> dict[str, int]:
    """Returns the sizes of latents and blocks as compile-time arguments, under the names of all kernels."""
    sizes = {"RANK": rank, "ROPE_DIM": rope_dim, "BLOCK_SIZE": block_size, "HEAD_DIM": rank}
    return sizes | {"BLOCK_R": padded(rank), "BLOCK_P": padded(rope_dim), "BLOCK_D": padded(rank)}


def _check(call: Call) -> None:
    """Raises `ValueError` unless the kernels support the shapes, dtypes and strides of a call."""
    _, num_heads, dim = call.query.shape
    _, num_stored, _, stored_dim = call.cache.shape
    rope_dim = dim - call.rank
    if not (num_stored == 1 and stored_dim == dim and 0 < call.rank <= MAX_RANK and 0 < rope_dim <= MAX_ROPE_DIM):
        raise ValueError(
            f"latent_attention: {num_heads} queries of {call.rank} + {rope_dim} numbers over {num_stored} latents of "
            f"{stored_dim}; a token has one latent of the same size, of at most {MAX_RANK} + {MAX_ROPE_DIM} numbers"
        )
    if call.cache.dtype != call.query.dtype or call.cache.strides[2:] != (dim, 1):
        raise ValueError(
            f"latent_attention: a query in {call.query.dtype} over a cache in {call.cache.dtype} with strides "
            f"{list(call.cache.strides)}; the dtypes must be equal, and the latents of a block contiguous"
        )
    if call.num_decodes > MAX_DECODES:
        raise ValueError(f"latent_attention: {call.num_decodes} decodes in a step; the grid takes {MAX_DECODES}")


_FORMS = ((8, 2, 1), (512, 64, 16), (512, 64, 256))
"""(rank, rope_dim, block_size) from the smallest to the largest."""


def specialisations(target: Target) -> Iterator[Specialisation]:
    """Yields the specialisations of the three kernels for a target, from the smallest to the largest sizes."""
    for dtype, sizes in product((torch.float32, torch.float16, torch.bfloat16), _FORMS):
        yield _form(latent_decode_kernel, dtype, sizes, decode_config(target, dtype))
        yield _form(latent_prefill_kernel, dtype, sizes, prefill_config(target, dtype))
    for dtype, sizes, most in product((torch.float32, torch.float16, torch.bfloat16), _FORMS[:2], MERGE_SIZES[:2]):
        form = _form(merge_kernel, dtype, sizes, MERGE_CONFIG)
        yield replace(form, constants={**form.constants, "MAX_SLOTS": most})


_POINTERS = ("q_ptr", "cache_ptr", "out_ptr")
_FLOATS = {"sums_ptr": "*fp32", "stats_ptr": "*fp32", "score_scale": "fp32"}


def _form(kernel: Any, dtype: torch.dtype, sizes: tuple[int, int, int], config: Config) -> Specialisation:
    """Builds a specialisation from the names of the kernel's signature; an argument that is not known is an integer."""
    values = _sizes(*sizes) | config.tile()
    names = [name for name in kernel.arg_names if name not in values and name != "MAX_SLOTS"]
    types = dict.fromkeys(_POINTERS, "*" + TORCH_TO_TRITON[dtype]) | _FLOATS
    kinds = {name: types.get(name, "*i32" if name.endswith("_ptr") else "i32") for name in names}
    constants = {name: values[name] for name in kernel.arg_names if name in values}
    multiples = tuple(name for name in ("q_stride", "block_stride") if name in names and sizes[0] % 16 == 0)
    overlaps = config.num_stages > 1 and sizes[0] >= 64
    return Specialisation(kernel, kinds, constants, config.options(), multiples, overlaps)

"""Paged attention on the GPU, in Triton: checks a call, and chooses the kernels.

Sequences with one query go to the decode kernel (`_decode.py`), after the prefix kernel if they share their first
blocks. All others go to the prefill kernel (`_prefill.py`). With `deterministic` all sequences go there. Its tiles are
at fixed positions of a sequence and it does not split the keys, so no bit of a row depends on other rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import triton
from torch import Tensor

from .._fp8 import e4m3_storage, e4m3_type
from .._triton import TORCH_TO_TRITON, Specialisation, Target, current_target
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
)
from ._decode import decode_kernel, merge_kernel, prefix_kernel
from ._prefill import prefill_kernel
from .op import paged_attention

_LOG2_E = 1.4426950408889634
_NO_WINDOW = 2**31 - 1
_Arguments = dict[str, Any]
"""Arguments by name. Each kernel gets the arguments that its signature has."""


@paged_attention.register("cuda")
def paged_attention_triton(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    scale: float,
    window: int = 0,
    *,
    causal: bool = True,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    num_decodes: int = 0,
    num_shared: Tensor | None = None,
    deterministic: bool = False,
) -> Tensor:
    """Runs `paged_attention` in one to four kernels, without reading any result on the host.

    Raises:
        ValueError: The kernels do not support the heads, the dtypes or the layout of the cache.
    """
    _check(query, k_cache, v_cache)
    if query.stride(2) != 1 or query.stride(1) != query.shape[2]:
        query = query.contiguous()
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    absent = seq_lens.view(torch.float32)  # a pointer of the right type that is not read
    arguments = {
        "q_ptr": query,
        "k_ptr": e4m3_storage(k_cache, current_target()),
        "v_ptr": e4m3_storage(v_cache, current_target()),
        "tables_ptr": block_tables,
        "seq_lens_ptr": seq_lens,
        "starts_ptr": query_start_loc,
        "num_shared_ptr": seq_lens if num_shared is None else num_shared,
        "sinks_ptr": absent if sinks is None else sinks,
        "slopes_ptr": absent if alibi_slopes is None else alibi_slopes,
        "out_ptr": out,
        "q_stride": query.stride(0),
        "block_stride": k_cache.stride(0),
        "table_stride": block_tables.stride(0),
        "num_heads": query.shape[1],
        "group": query.shape[1] // k_cache.shape[1],
        "window": window or _NO_WINDOW,
        "score_scale": _LOG2_E * (2 * scale / softcap if softcap else scale),
        "cap": _LOG2_E * softcap,
        "has_sinks": int(sinks is not None),
        "has_slopes": int(alibi_slopes is not None),
        "has_shared": int(num_shared is not None and not window),
        "deterministic": int(deterministic),
        "HEAD_DIM": query.shape[2],
        "BLOCK_SIZE": k_cache.shape[2],
        "BLOCK_D": padded(query.shape[2]),
        "EDITED": softcap > 0 or alibi_slopes is not None,
        "CAUSAL": causal,
    }
    num_decodes = 0 if deterministic else num_decodes
    if num_decodes:
        _decode(arguments, num_decodes)
    if len(query) > num_decodes:
        _prefill(arguments, num_decodes)
    return out


def _prefill(arguments: _Arguments, first_seq: int) -> None:
    """Launches the prefill kernel for sequences from `first_seq` on. Each sequence before it has one query row."""
    query, num_seqs = arguments["q_ptr"], len(arguments["seq_lens_ptr"])
    sizes = query.dtype, arguments["k_ptr"].dtype, query.shape[2], arguments["EDITED"]
    config = prefill_config(current_target(), *sizes, deterministic=bool(arguments["deterministic"]))
    num_tiles = (len(query) - first_seq) // _rows_per_tile(arguments, config) + num_seqs - first_seq
    own = {"first_seq": first_seq, "num_seqs": num_seqs}
    _launch(prefill_kernel, (num_tiles, _head_tiles(arguments, config)), config, arguments | own)


def _decode(arguments: _Arguments, num_seqs: int) -> None:
    """Launches the kernels for the first `num_seqs` sequences: prefix (if shared), decode, and merge (if split)."""
    query, has_prefix = arguments["q_ptr"], arguments["has_shared"]
    num_heads, head_dim = query.shape[1:]
    sizes = current_target(), query.dtype, arguments["k_ptr"].dtype, head_dim, arguments["EDITED"]
    config, prefix_config = decode_config(*sizes, arguments["group"]), prefill_config(*sizes)
    limit = MAX_SLOTS // 2 if has_prefix else MAX_SLOTS
    grid = _split_grid(arguments, config, num_seqs, limit=limit)
    prefix_grid = (0, 0, 0)
    if has_prefix:
        num_tiles = triton.cdiv(num_seqs, _rows_per_tile(arguments, prefix_config))
        share = {"limit": limit, "programs_per_processor": PREFIX_PROGRAMS_PER_PROCESSOR}
        prefix_grid = _split_grid(arguments, prefix_config, num_tiles, **share)
    num_slots = prefix_grid[2] + grid[2]
    sums = stats = arguments["slopes_ptr"]  # not used if there is one slot
    if num_slots > 1:
        sums = torch.empty((num_seqs, num_heads, num_slots, head_dim), dtype=torch.float32, device=query.device)
        stats = torch.empty((num_seqs, num_heads, num_slots, 2), dtype=torch.float32, device=query.device)
    own = {"sums_ptr": sums, "stats_ptr": stats, "num_slots": num_slots, "num_seqs": num_seqs}
    arguments = arguments | own | {"first_slot": prefix_grid[2]}
    if has_prefix:
        _launch(prefix_kernel, prefix_grid, prefix_config, arguments)
    _launch(decode_kernel, grid, config, arguments)
    if num_slots > 1:
        max_slots = {"MAX_SLOTS": next(most for most in MERGE_SIZES if num_slots <= most)}
        _launch(merge_kernel, (num_seqs * num_heads,), MERGE_CONFIG, arguments | max_slots)


def _split_grid(arguments: _Arguments, config: Config, num_tiles: int, **share: int) -> tuple[int, int, int]:
    """Returns the grid of a kernel that splits keys: (num_tiles, tiles of heads, splits); `share`: see `num_splits`."""
    max_keys = arguments["tables_ptr"].shape[1] * arguments["BLOCK_SIZE"]
    head_tiles = _head_tiles(arguments, config)
    splits = num_splits(current_target(), num_tiles * head_tiles, max_keys, config.block_n, **share)
    return num_tiles, head_tiles, splits


def _head_tiles(arguments: _Arguments, config: Config) -> int:
    """Returns the number of tiles for the heads of one query: one per KV head, or more if a group is wider."""
    group = arguments["group"]
    return arguments["num_heads"] // group * triton.cdiv(group, config.block_m)


def _rows_per_tile(arguments: _Arguments, config: Config) -> int:
    """Returns the number of queries of a tile, where each query takes the heads of a group."""
    return config.block_m // min(arguments["group"], config.block_m)


def _launch(kernel: Any, grid: tuple[int, ...], config: Config, arguments: _Arguments) -> None:
    """Launches a kernel with the entries of `arguments` and of the tile that its signature names."""
    arguments = arguments | config.tile()
    own = {name: arguments[name] for name in kernel.arg_names}
    kernel[grid](**own, **config.options())


def _check(query: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """Raises `ValueError` unless the kernels support the shapes, dtypes and strides of these tensors."""
    num_heads, head_dim = query.shape[1:]
    num_kv_heads, block_size = k_cache.shape[1:3]
    sizes_fit = MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM and k_cache.shape[3] == head_dim
    if not sizes_fit or num_heads % num_kv_heads:
        raise ValueError(
            f"paged_attention: {num_heads} query heads of {head_dim} over {num_kv_heads} KV heads of "
            f"{k_cache.shape[3]}; the sizes must be equal, {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, and the number of KV "
            f"heads must divide that of query heads"
        )
    if k_cache.dtype not in (query.dtype, torch.float8_e4m3fn):
        raise ValueError(
            f"paged_attention: a query in {query.dtype} over a cache in {k_cache.dtype}; "
            f"the cache must be in the dtype of the query or in torch.float8_e4m3fn"
        )
    strides = (block_size * head_dim, head_dim, 1)
    if k_cache.stride()[1:] != strides or v_cache.stride() != k_cache.stride() or v_cache.shape != k_cache.shape:
        raise ValueError(
            f"paged_attention: caches of strides {list(k_cache.stride())} and {list(v_cache.stride())}; "
            f"they must be alike and contiguous within a block: [..., {', '.join(map(str, strides))}]"
        )


_POINTERS_OF_QUERY = ("q_ptr", "out_ptr")
_POINTERS_OF_CACHE = ("k_ptr", "v_ptr")
_INTEGER_POINTERS = ("tables_ptr", "seq_lens_ptr", "starts_ptr", "num_shared_ptr")
_FLOAT_POINTERS = ("sinks_ptr", "slopes_ptr", "sums_ptr", "stats_ptr")
_FLOATS = ("score_scale", "cap")
_MULTIPLES_OF_16 = ("q_stride", "block_stride")


def specialisations(target: Target) -> Iterator[Specialisation]:
    """Yields the specialisations of the four kernels for a target, from the smallest to the largest sizes."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for cache_dtype in (dtype, torch.float8_e4m3fn):
            types = _types(dtype, cache_dtype, target)
            for (head_dim, block_size), edited in product(((8, 1), (64, 16), (128, 16), (256, 256)), (False, True)):
                constants = {"HEAD_DIM": head_dim, "BLOCK_SIZE": block_size, "BLOCK_D": padded(head_dim)}
                constants |= {"EDITED": edited}
                sizes = target, dtype, cache_dtype, head_dim, edited
                configs = {prefill_config(*sizes, deterministic=choice) for choice in (False, True)}
                for causal, config in product((True, False), configs):
                    yield _form(prefill_kernel, types, constants | {"CAUSAL": causal}, config)
                yield _form(prefix_kernel, types, constants, prefill_config(*sizes))
                for config in {decode_config(*sizes, group) for group in (1, 32)}:
                    yield _form(decode_kernel, types, constants, config)
        for head_dim, max_slots in product((MIN_HEAD_DIM, 128, MAX_HEAD_DIM), MERGE_SIZES):
            constants = {"HEAD_DIM": head_dim, "BLOCK_D": padded(head_dim), "MAX_SLOTS": max_slots}
            yield _form(merge_kernel, types, constants, MERGE_CONFIG)


def _types(dtype: torch.dtype, cache_dtype: torch.dtype, target: Target) -> dict[str, str]:
    """Returns argument name -> Triton type, for the arguments of all kernels here that are pointers or floats.

    The other arguments are integers. The target decides which 8-bit float type the cache has.
    """
    cache = e4m3_type(target) if cache_dtype == torch.float8_e4m3fn else TORCH_TO_TRITON[cache_dtype]
    types = dict.fromkeys(_POINTERS_OF_QUERY, "*" + TORCH_TO_TRITON[dtype])
    types |= dict.fromkeys(_POINTERS_OF_CACHE, "*" + cache)
    types |= dict.fromkeys(_INTEGER_POINTERS, "*i32") | dict.fromkeys(_FLOAT_POINTERS, "*fp32")
    return types | dict.fromkeys(_FLOATS, "fp32")


def _form(kernel: Any, types: dict[str, str], constants: dict[str, int], config: Config) -> Specialisation:
    """Builds a specialisation from the entries of `types` and `constants` that the kernel's signature names."""
    values = constants | config.tile()
    constants = {name: values[name] for name in kernel.arg_names if name in values}
    types = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
    multiples = tuple(name for name in _MULTIPLES_OF_16 if name in types and constants["HEAD_DIM"] % 16 == 0)
    # Only copies of at least four bytes a thread are asynchronous, which rows of very small heads are not.
    overlaps = config.num_stages > 1 and types.get("q_ptr") != "*fp32" and constants["HEAD_DIM"] >= 64
    return Specialisation(kernel, types, constants, config.options(), multiples, overlaps)

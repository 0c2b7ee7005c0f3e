"""Paged attention on the GPU, in Triton: launches the kernels that `plan_launches` chooses for a call.

With `deterministic` all sequences go to the prefill kernel. Its tiles are at fixed positions of a sequence and it does
not split the keys, so no bit of a row depends on other rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from .._fp8 import e4m3_storage, e4m3_type
from .._triton import TORCH_TO_TRITON, Layout, Specialisation, Target, current_target
from ._configs import (
    MAX_HEAD_DIM,
    MERGE_CONFIG,
    MERGE_SIZES,
    MIN_HEAD_DIM,
    Config,
    decode_config,
    padded,
    prefill_config,
    prefix_config,
)
from ._decode import decode_kernel, merge_kernel, prefix_kernel
from ._plan import Call, plan_launches
from ._prefill import prefill_kernel
from .op import paged_attention


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
    kv_scales: Tensor | None = None,
) -> Tensor:
    """Runs `paged_attention` in one to four kernels, without reading any result on the host.

    Raises:
        ValueError: The kernels do not support the heads, the dtypes or the layout of the cache.
    """
    target = current_target()
    if query.stride(2) != 1 or query.stride(1) != query.shape[2]:
        query = query.contiguous()
    shape, caches = query.shape, (Layout.of(k_cache), Layout.of(v_cache))
    layouts = (Layout.of(query), *caches, Layout.of(block_tables))
    has = (sinks is not None, alibi_slopes is not None, num_shared is not None, kv_scales is not None)
    plan = plan_launches(Call(target, *layouts, scale, softcap, window, causal, num_decodes, deterministic, *has))
    out = torch.empty(shape, dtype=query.dtype, device=query.device)
    absent = seq_lens.view(torch.float32)  # A pointer of the right type that is not read.
    sums = stats = absent
    if plan.num_slots > 1:
        slots = (num_decodes, shape[1], plan.num_slots)
        sums = torch.empty((*slots, shape[2]), dtype=torch.float32, device=query.device)
        stats = torch.empty((*slots, 2), dtype=torch.float32, device=query.device)
    tensors = {
        "q_ptr": query,
        "k_ptr": e4m3_storage(k_cache, target),
        "v_ptr": e4m3_storage(v_cache, target),
        "tables_ptr": block_tables,
        "seq_lens_ptr": seq_lens,
        "starts_ptr": query_start_loc,
        "num_shared_ptr": seq_lens if num_shared is None else num_shared,
        "sinks_ptr": absent if sinks is None else sinks,
        "slopes_ptr": absent if alibi_slopes is None else alibi_slopes,
        "scales_ptr": absent if kv_scales is None else kv_scales,
        "out_ptr": out,
        "sums_ptr": sums,
        "stats_ptr": stats,
    }
    for names, launch in plan.launches:
        launch.run(*[tensors[name] for name in names])
    return out


_POINTERS_OF_QUERY = ("q_ptr", "out_ptr")
_POINTERS_OF_CACHE = ("k_ptr", "v_ptr")
_INTEGER_POINTERS = ("tables_ptr", "seq_lens_ptr", "starts_ptr", "num_shared_ptr")
_FLOAT_POINTERS = ("sinks_ptr", "slopes_ptr", "scales_ptr", "sums_ptr", "stats_ptr")
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
                yield _form(prefix_kernel, types, constants, prefix_config(*sizes))
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

"""Writing new keys and values into the KV cache: the definition.

k_cache[slot // block_size, :, slot % block_size] = key / kv_scales[0],   values by kv_scales[1]
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._op import Draw, Sample, op

_E4M3_MAX, _INT8_MAX = torch.finfo(torch.float8_e4m3fn).max, 127


def _samples(draw: Draw) -> Iterator[Sample]:
    def inputs(
        num_tokens: int,
        num_blocks: int,
        heads: int,
        block_size: int,
        head_dim: int,
        cache_dtype: torch.dtype = draw.dtype,
        num_padding: int = 0,
    ) -> tuple[Tensor, ...]:
        # Keys and values are views of one fused projection, as the attention layer passes them.
        key, value = draw.normal(num_tokens, 2 * heads, head_dim).split(heads, dim=1)
        cache = draw.normal(2, num_blocks, heads, block_size, head_dim).to(cache_dtype)
        slots = draw.permutation(num_blocks * block_size)[:num_tokens]
        slots[draw.permutation(num_tokens)[:num_padding]] = -1
        return key, value, cache[0], cache[1], slots

    yield Sample("one token", inputs(1, 1, 1, 1, 8))
    yield Sample("odd sizes", inputs(63, 9, 3, 16, 31))
    yield Sample("every slot", inputs(64, 4, 2, 16, 32))
    yield Sample("large blocks", inputs(123, 3, 1, 64, 128))
    yield Sample("no tokens", inputs(0, 2, 2, 16, 32))
    yield Sample("padding", inputs(21, 3, 3, 16, 32, num_padding=6))
    yield Sample("padding only", inputs(2, 1, 1, 16, 8, num_padding=2))
    key, *others = inputs(40, 3, 9, 16, 64, torch.float8_e4m3fn, num_padding=3)
    key[3:7] = torch.arange(-800, 800, 1600 / key[3:7].numel(), device=draw.device).view(4, 9, 64)
    yield Sample("8-bit cache", (key, *others))
    key, *others = inputs(37, 3, 9, 16, 64, torch.float8_e4m3fn, num_padding=2)
    yield Sample("8-bit cache, scales", (key * 900, *others), {"kv_scales": draw.scales(9)})


@op(samples=_samples, tolerance=dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), (0.0, 0.0)))
def store_kv(
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    kv_scales: Tensor | None = None,
) -> None:
    """Stores one key and one value per token and KV head, rounded to the dtype of the cache, ties to even.

    Args:
        key: `[num_tokens, num_kv_heads, head_dim]`, may be a strided view of contiguous heads.
        value: The shape and dtype of the key, and the same conditions.
        k_cache: `[num_blocks, num_kv_heads, block_size, head_dim]`, the dtype of the key, or float8_e4m3fn, for which
            numbers are clamped to +-448, the largest it has, or on a CPU int8, for which they are clamped to +-127. It
            is changed in place.
        v_cache: The shape, dtype and strides of `k_cache`. It is changed in place.
        slot_mapping: `[num_tokens]` int64, distinct slots `block_id * block_size + offset`. A token with a negative
            slot is padding, and is not stored.
        kv_scales: `[2, num_kv_heads]` float32, contiguous, for an 8-bit cache: the number by which the keys of each
            head are divided before they are rounded, then the same for values. None to divide by nothing.
    """
    block_size, is_kept = k_cache.shape[2], slot_mapping >= 0
    if not bool(is_kept.all()):
        key, value, slot_mapping = key[is_kept], value[is_kept], slot_mapping[is_kept]
    block_ids, offsets = slot_mapping // block_size, slot_mapping % block_size
    if kv_scales is not None:
        key, value = key / kv_scales[0].unsqueeze(-1), value / kv_scales[1].unsqueeze(-1)
    for cache, new in ((k_cache, key), (v_cache, value)):
        if cache.dtype == torch.float8_e4m3fn:
            # The bytes are indexed, because torch does not index 8-bit floats on every device.
            narrow = new.clamp(-_E4M3_MAX, _E4M3_MAX).to(cache.dtype)
            cache.view(torch.uint8)[block_ids, :, offsets] = narrow.view(torch.uint8)
        elif cache.dtype == torch.int8:
            narrow = new.round().clamp(-_INT8_MAX, _INT8_MAX).nan_to_num(0.0)
            cache[block_ids, :, offsets] = narrow.to(torch.int8)
        else:
            cache[block_ids, :, offsets] = new.to(cache.dtype)

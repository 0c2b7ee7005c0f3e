"""Writing new keys and values into the KV cache: the definition.

k_cache[slot // block_size, :, slot % block_size] = key,   the same for the values
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._op import Draw, Sample, op


def _samples(draw: Draw) -> Iterator[Sample]:
    def inputs(num_tokens: int, num_blocks: int, heads: int, block_size: int, head_dim: int) -> tuple[Tensor, ...]:
        # Keys and values are views of one fused projection, as the attention layer passes them.
        key, value = draw.normal(num_tokens, 2 * heads, head_dim).split(heads, dim=1)
        cache = draw.normal(2, num_blocks, heads, block_size, head_dim)
        return key, value, cache[0], cache[1], draw.permutation(num_blocks * block_size)[:num_tokens]

    yield Sample("one token", inputs(1, 1, 1, 1, 8))
    yield Sample("odd sizes", inputs(63, 9, 3, 16, 31))
    yield Sample("every slot", inputs(64, 4, 2, 16, 32))
    yield Sample("large blocks", inputs(123, 3, 1, 64, 128))
    yield Sample("no tokens", inputs(0, 2, 2, 16, 32))


@op(samples=_samples, tolerance=dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), (0.0, 0.0)))
def store_kv(key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Stores one key and one value per token and KV head.

    Args:
        key: `[num_tokens, num_kv_heads, head_dim]`, may be a strided view.
        value: `[num_tokens, num_kv_heads, head_dim]`, may be a strided view.
        k_cache: `[num_blocks, num_kv_heads, block_size, head_dim]`. Changed in place.
        v_cache: The same. Changed in place.
        slot_mapping: `[num_tokens]` int64, distinct: `block_id * block_size + offset`.
    """
    block_size = k_cache.shape[2]
    block_ids, offsets = slot_mapping // block_size, slot_mapping % block_size
    k_cache[block_ids, :, offsets] = key
    v_cache[block_ids, :, offsets] = value

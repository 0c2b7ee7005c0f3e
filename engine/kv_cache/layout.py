"""The tensors of the KV cache: `allocate_kv_cache` makes them, `kv_block_bytes` is the size of a block."""

from __future__ import annotations

import math

import numpy as np
import torch


def kv_block_bytes(num_pairs: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype) -> int:
    """Returns the bytes of one block: the keys and values of `block_size` tokens in `num_pairs` layers."""
    return 2 * num_pairs * num_kv_heads * block_size * head_dim * dtype.itemsize


def allocate_kv_cache(
    num_pairs: int,
    num_blocks: int,
    num_kv_heads: int,
    block_size: int,
    head_dim: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Allocates the key and value caches, of which each layer of a group uses one pair.

    The caches are zeroed, so that no kernel reads a NaN from a slot that was never written.

    Args:
        num_pairs: Number of pairs of a key and a value cache, which is the number of layers of the largest group.
        num_blocks: Number of blocks of the pool.
        num_kv_heads: Key and value heads of a layer.
        block_size: Tokens per block.
        head_dim: Size of a head.
        dtype: Element type.
        device: Device of the caches.

    Returns:
        Pairs (k_cache, v_cache), each `[num_blocks, num_kv_heads, block_size, head_dim]`.
    """
    shape = (num_blocks, num_kv_heads, block_size, head_dim)
    return [(_zeros(shape, dtype, device), _zeros(shape, dtype, device)) for _ in range(num_pairs)]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy asks the system for zeroed pages, which cost no time and no memory until they are written. torch would write
    # zeros to all of them.
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)

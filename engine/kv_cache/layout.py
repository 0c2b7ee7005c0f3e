"""The tensors of the KV cache: their shape and their size."""

from __future__ import annotations

import math

import numpy as np
import torch


def kv_block_bytes(num_layers: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype) -> int:
    """Returns the bytes of one block: keys and values of `block_size` tokens in every layer."""
    return 2 * num_layers * num_kv_heads * block_size * head_dim * dtype.itemsize


def allocate_kv_cache(
    num_layers: int,
    num_blocks: int,
    num_kv_heads: int,
    block_size: int,
    head_dim: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Allocates the key and value cache of every layer.

    Zeroed, so that no kernel ever meets a NaN in a slot that was not written.

    Args:
        num_layers: Layers of the model.
        num_blocks: Blocks of the pool.
        num_kv_heads: Key-value heads of a layer.
        block_size: Tokens per block.
        head_dim: Size of a head.
        dtype: Element type.
        device: Where.

    Returns:
        Per layer (k_cache, v_cache), each `[num_blocks, num_kv_heads, block_size, head_dim]`.
    """
    shape = (num_blocks, num_kv_heads, block_size, head_dim)
    return [(_zeros(shape, dtype, device), _zeros(shape, dtype, device)) for _ in range(num_layers)]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy asks the system for zeroed pages, which take neither time nor memory before they are written; torch writes.
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)

"""The tensors of the KV cache: `allocate_kv_cache` makes them, `kv_block_bytes` is the size of a block."""

from __future__ import annotations

import contextlib
import math
import mmap
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What a rank stores of each token: keys and values of heads, or one latent of which both are made.

    A latent is one vector without heads. It takes the place of the key, and its first numbers are the value.

    Attributes:
        num_pairs: Number of pairs of a key and a value cache, which is the number of layers of the largest group.
        num_heads: Key and value heads of a layer; 1 for latents.
        head_dim: Numbers of a key, or of a latent.
        latent_rank: Leading numbers of a latent that are its value, so that no values are stored; 0 for heads.
    """

    num_pairs: int
    num_heads: int
    head_dim: int
    latent_rank: int = 0

    @property
    def numbers_per_token(self) -> int:
        """Numbers that are stored of a token in one layer."""
        return (1 if self.latent_rank else 2) * self.num_heads * self.head_dim


def kv_block_bytes(shape: CacheShape, block_size: int, dtype: torch.dtype) -> int:
    """Returns the bytes of one block: what the layers of a group store of `block_size` tokens."""
    return shape.num_pairs * block_size * shape.numbers_per_token * dtype.itemsize


def allocate_kv_cache(
    shape: CacheShape, num_blocks: int, block_size: int, *, dtype: torch.dtype, device: torch.device
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Allocates the key and value caches, of which each layer of a group uses one pair.

    The caches are zeroed, so that no kernel reads a NaN from a slot that was never written.

    Args:
        shape: What is stored of a token.
        num_blocks: Number of blocks of the pool.
        block_size: Tokens per block.
        dtype: Element type.
        device: Device of the caches.

    Returns:
        Pairs (k_cache, v_cache), each `[num_blocks, num_heads, block_size, head_dim]`. For latents, `v_cache` is a view
        of the first `latent_rank` numbers of `k_cache`.
    """
    sizes = (num_blocks, shape.num_heads, block_size, shape.head_dim)

    def pair() -> tuple[torch.Tensor, torch.Tensor]:
        keys = lazy_zeros(sizes, dtype, device)
        return keys, keys[..., : shape.latent_rank] if shape.latent_rank else lazy_zeros(sizes, dtype, device)

    return [pair() for _ in range(shape.num_pairs)]


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Returns zeros that take no memory of a CPU's host before they are written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # Pages that the system maps are zero, and cost no time and no memory until they are written. The C library's calloc
    # gives such pages only while its heap has no free piece of this size; it writes zeros to a piece.
    num_bytes = math.prod(shape) * dtype.itemsize
    pages = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # A system without huge pages refuses the advice.
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)[:num_bytes].view(dtype).view(shape)

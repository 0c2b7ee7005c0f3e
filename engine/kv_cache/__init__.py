"""The KV cache: its tensors, the pool of blocks, the blocks of each sequence, and the search for known prefixes."""

from __future__ import annotations

from .blocks import BlockPool
from .groups import LayerCache, LayerGroup, cut_into_groups, max_held_blocks
from .layout import CacheShape, allocate_kv_cache, kv_block_bytes
from .manager import KVCacheManager
from .states import StateShape, allocate_states

__all__ = [
    "BlockPool",
    "CacheShape",
    "KVCacheManager",
    "LayerCache",
    "LayerGroup",
    "StateShape",
    "allocate_kv_cache",
    "allocate_states",
    "cut_into_groups",
    "kv_block_bytes",
    "max_held_blocks",
]

"""Where keys and values live: blocks, who holds them, and which hold a known prefix."""

from __future__ import annotations

from .blocks import BlockPool
from .layout import allocate_kv_cache, kv_block_bytes
from .manager import KVCacheManager

__all__ = ["BlockPool", "KVCacheManager", "allocate_kv_cache", "kv_block_bytes"]

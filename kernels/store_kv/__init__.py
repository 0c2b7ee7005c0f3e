"""Writing new keys and values into the KV cache."""

from __future__ import annotations

from .op import store_kv

__all__ = ["store_kv"]

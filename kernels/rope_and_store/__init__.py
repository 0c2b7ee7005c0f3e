"""What an attention layer does to its queries, keys and values before it attends, in one pass."""

from __future__ import annotations

from .op import rope_and_store

__all__ = ["rope_and_store"]

"""Attention over a KV cache that is cut into blocks."""

from __future__ import annotations

from .op import paged_attention

__all__ = ["paged_attention"]

"""Attention over a KV cache that is cut into blocks."""

from __future__ import annotations

from .library import PromptLibrary
from .op import paged_attention

__all__ = ["PromptLibrary", "paged_attention"]

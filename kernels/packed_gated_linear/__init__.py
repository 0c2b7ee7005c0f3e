"""The first half of a SwiGLU network over a packed weight."""

from __future__ import annotations

from .layout import can_pack_gated, pack_gated
from .op import packed_gated_linear

__all__ = ["can_pack_gated", "pack_gated", "packed_gated_linear"]

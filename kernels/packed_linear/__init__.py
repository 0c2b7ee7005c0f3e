"""A linear layer whose weight was rearranged for the matrix instructions of the CPU."""

from __future__ import annotations

from .layout import can_pack_panels, pack_panels
from .op import packed_linear

__all__ = ["can_pack_panels", "pack_panels", "packed_linear"]

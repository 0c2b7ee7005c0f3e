"""A linear layer whose weight was laid out once for the CPU's matrix instructions."""

from __future__ import annotations

from .layout import can_pack_panels, pack_panels
from .op import packed_linear

__all__ = ["can_pack_panels", "pack_panels", "packed_linear"]

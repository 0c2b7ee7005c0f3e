"""A linear layer of 4- or 8-bit integers in groups for the CPU."""

from __future__ import annotations

from .layout import PackedGroups, can_pack_groups, pack_groups
from .op import packed_group_linear

__all__ = ["PackedGroups", "can_pack_groups", "pack_groups", "packed_group_linear"]

"""A linear layer whose weight is integers of 4 or 8 bits with a scale for each group, and plain activations."""

from __future__ import annotations

from .layout import GROUP_UNIT, by_groups, num_words, pack_codes, unpack_codes
from .op import group_linear

__all__ = ["GROUP_UNIT", "by_groups", "group_linear", "num_words", "pack_codes", "unpack_codes"]

"""A linear layer of 8-bit integers for the CPU, one scale per row of inputs and of weights."""

from __future__ import annotations

from .layout import can_pack_int8, pack_int8
from .op import int8_linear

__all__ = ["can_pack_int8", "int8_linear", "pack_int8"]

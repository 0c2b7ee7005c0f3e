"""The gate of a feed-forward layer, whose rows are quantised to 8-bit floats."""

from __future__ import annotations

from .op import gate_and_mul_fp8

__all__ = ["gate_and_mul_fp8"]

"""A linear layer of a weight in 8-bit floats with scales of rows or of groups of columns."""

from __future__ import annotations

from .op import GROUP, fp8_linear

__all__ = ["GROUP", "fp8_linear"]

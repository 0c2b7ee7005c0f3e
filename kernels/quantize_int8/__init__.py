"""Quantisation of rows to 8-bit integers with a scale per row, or with given scale and zero point."""

from __future__ import annotations

from .op import quantize_int8

__all__ = ["quantize_int8"]

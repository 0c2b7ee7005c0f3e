"""Quantisation of rows to 8-bit floats with a scale per row."""

from __future__ import annotations

from .op import quantize_fp8

__all__ = ["quantize_fp8"]

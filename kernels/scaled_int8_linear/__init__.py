"""A linear layer of 8-bit integers, inputs and weights, with one scale per row of each."""

from __future__ import annotations

from .op import scaled_int8_linear

__all__ = ["scaled_int8_linear"]

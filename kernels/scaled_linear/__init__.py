"""A linear layer of 8-bit inputs and weights, one scale per row of each."""

from __future__ import annotations

from .op import scaled_linear

__all__ = ["scaled_linear"]

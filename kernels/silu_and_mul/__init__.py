"""The gate of a SwiGLU feed-forward layer."""

from __future__ import annotations

from .op import silu_and_mul

__all__ = ["silu_and_mul"]

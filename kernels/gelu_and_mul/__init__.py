"""The gate of a GeGLU feed-forward layer."""

from __future__ import annotations

from .op import gelu_and_mul

__all__ = ["gelu_and_mul"]

"""LayerNorm, with the residual addition before it."""

from __future__ import annotations

from .op import layer_norm

__all__ = ["layer_norm"]

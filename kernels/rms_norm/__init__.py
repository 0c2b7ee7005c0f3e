"""RMSNorm, with the residual addition before it."""

from __future__ import annotations

from .op import rms_norm

__all__ = ["rms_norm"]

"""RMSNorm whose rows are quantised to 8-bit floats."""

from __future__ import annotations

from .op import rms_norm_fp8

__all__ = ["rms_norm_fp8"]

"""The causal convolution over the last few tokens of a sequence, see `op.short_conv`."""

from __future__ import annotations

from .op import short_conv

__all__ = ["short_conv"]

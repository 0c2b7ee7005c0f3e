"""Attention of encoders: texts of any lengths, all tokens in one row, without a cache."""

from __future__ import annotations

from .op import varlen_attention

__all__ = ["varlen_attention"]

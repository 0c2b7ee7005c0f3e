"""Attention of encoders whose scores have terms of the content and of the distance of two tokens."""

from __future__ import annotations

from .op import disentangled_attention

__all__ = ["disentangled_attention"]

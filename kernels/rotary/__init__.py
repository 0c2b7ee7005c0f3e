"""Rotary position embedding, in place."""

from __future__ import annotations

from .op import rotary

__all__ = ["rotary"]

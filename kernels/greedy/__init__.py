"""The most likely token of each row."""

from __future__ import annotations

from .op import greedy

__all__ = ["greedy"]

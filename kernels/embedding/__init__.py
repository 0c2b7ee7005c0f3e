"""Lookup of the rows of a table by id."""

from __future__ import annotations

from .op import embedding

__all__ = ["embedding"]

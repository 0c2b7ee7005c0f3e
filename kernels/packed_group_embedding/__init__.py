"""Lookup of the rows of a table of 4- or 8-bit integers in groups for the CPU."""

from __future__ import annotations

from .op import packed_group_embedding

__all__ = ["packed_group_embedding"]

"""A matrix product in which no bit of a row depends on the other rows."""

from __future__ import annotations

from .op import invariant_linear

__all__ = ["invariant_linear"]

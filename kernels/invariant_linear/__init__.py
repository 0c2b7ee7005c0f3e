"""A matrix product whose rows do not depend on each other, to the bit."""

from __future__ import annotations

from .op import invariant_linear

__all__ = ["invariant_linear"]

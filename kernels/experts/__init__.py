"""The experts of a layer: a feed-forward network of its own for every token and each of its choices."""

from __future__ import annotations

from .coded import KINDS, SPAN, CodedMatrices, can_multiply_codes
from .op import GATES, experts

__all__ = ["GATES", "KINDS", "SPAN", "CodedMatrices", "can_multiply_codes", "experts"]

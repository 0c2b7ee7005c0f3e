"""The experts of a layer: a feed-forward network of its own for every token and each of its choices."""

from __future__ import annotations

from .coded import KINDS, SPAN, CodedMatrices
from .op import GATES, experts

__all__ = ["GATES", "KINDS", "SPAN", "CodedMatrices", "experts"]

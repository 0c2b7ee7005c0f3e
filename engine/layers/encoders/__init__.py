"""Layers that only encoders have: attention to whole texts, amounts by distance, and the heads of classifiers."""

from __future__ import annotations

from .attention import EncoderAttention
from .class_head import HEAD_ACTIVATIONS, ClassHead
from .relative_bias import DistanceBias, RelativeBias

__all__ = ["HEAD_ACTIVATIONS", "ClassHead", "DistanceBias", "EncoderAttention", "RelativeBias"]

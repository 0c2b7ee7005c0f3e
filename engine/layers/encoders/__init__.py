"""Layers that only encoders have: attention to whole texts, amounts by distance, and the heads of classifiers."""

from __future__ import annotations

from .attention import EncoderAttention
from .class_head import HEAD_ACTIVATIONS, ClassHead
from .disentangled_attention import DisentangledAttention, DistanceTerms
from .distance_vectors import DistanceVectors
from .relative_bias import DistanceBias, RelativeBias
from .text_conv import TextConv

__all__ = [
    "HEAD_ACTIVATIONS",
    "ClassHead",
    "DisentangledAttention",
    "DistanceBias",
    "DistanceTerms",
    "DistanceVectors",
    "EncoderAttention",
    "RelativeBias",
    "TextConv",
]

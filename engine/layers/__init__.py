"""The layers decoders are made of; each says in `forward` what it computes and knows no model family."""

from __future__ import annotations

from .attention import Attention, Heads
from .block import PostNormBlock, PreNormBlock
from .embedding import LearnedPositions, NoPositions, TokenEmbedding
from .linear import Linear
from .mlp import ACTIVATIONS, MLP, GatedMLP, PlainMLP
from .norm import LayerNorm, NoNorm, Norm, RMSNorm
from .rotary import NoRotary, Rotary

__all__ = [
    "ACTIVATIONS",
    "MLP",
    "Attention",
    "GatedMLP",
    "Heads",
    "LayerNorm",
    "LearnedPositions",
    "Linear",
    "NoNorm",
    "NoPositions",
    "NoRotary",
    "Norm",
    "PlainMLP",
    "PostNormBlock",
    "PreNormBlock",
    "RMSNorm",
    "Rotary",
    "TokenEmbedding",
]

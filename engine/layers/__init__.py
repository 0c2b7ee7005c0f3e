"""The layers decoders are made of; each says in `forward` what it computes and knows no model family."""

from __future__ import annotations

from .attention import Attention, Heads
from .block import PostNormBlock, PreNormBlock
from .embedding import LearnedPositions, NoPositions, SharedTokenEmbedding, TokenEmbedding
from .fp8_linear import Fp8Linear
from .int8_linear import Int8Linear
from .invariant_linear import InvariantLinear
from .linear import Linear
from .mlp import ACTIVATIONS, GATES, MLP, GatedMLP, PlainMLP
from .norm import LayerNorm, NoNorm, Norm, Reduce, RMSNorm
from .rotate_and_store import RotateAndStore, StoreOnly, rotary_table
from .slots import Slot

__all__ = [
    "ACTIVATIONS",
    "GATES",
    "MLP",
    "Attention",
    "Fp8Linear",
    "GatedMLP",
    "Heads",
    "Int8Linear",
    "InvariantLinear",
    "LayerNorm",
    "LearnedPositions",
    "Linear",
    "NoNorm",
    "NoPositions",
    "Norm",
    "PlainMLP",
    "PostNormBlock",
    "PreNormBlock",
    "RMSNorm",
    "Reduce",
    "RotateAndStore",
    "SharedTokenEmbedding",
    "Slot",
    "StoreOnly",
    "TokenEmbedding",
    "rotary_table",
]

"""The layers of models: attention, feed-forward networks, norms, embeddings. No layer knows a model family."""

from __future__ import annotations

from .activation import ACTIVATIONS, Activation
from .attention import Attention, Heads
from .block import (
    ConvBlock,
    MixerBlock,
    MLPBlock,
    ParallelBlock,
    PostNormBlock,
    PreNormBlock,
    SandwichBlock,
    TokenMixer,
)
from .embedding import LearnedPositions, NoPositions, NoTokenTypes, SharedTokenEmbedding, TokenEmbedding, TokenTypes
from .encoders import (
    HEAD_ACTIVATIONS,
    ClassHead,
    DisentangledAttention,
    DistanceBias,
    DistanceTerms,
    DistanceVectors,
    EncoderAttention,
    RelativeBias,
    TextConv,
)
from .experts import EXPERT_GATES, ExpertMLP, Experts, ExpertsLayer, FeedForward
from .input_format import GATES, PLAIN, InputFormat, Quantized, Rows
from .invariant_linear import InvariantLinear
from .kv_scales import KVScales
from .latent_attention import LatentAttention, LatentSizes, UpProjections
from .linear import Linear, LinearBase, PackedWeight, Packs
from .mlp import MLP, GatedMLP, PlainMLP
from .norm import HeadLayerNorm, HeadNorm, LayerNorm, LayerNormPerHead, NoNorm, Norm, ProjectionNorm, Reduce, RMSNorm
from .rotate_and_store import (
    CacheWriter,
    ClampAndStore,
    NormAndStore,
    RotateAndStore,
    ScaleAndStore,
    StoreOnly,
    rotary_table,
)
from .router import Router, RouterSpec
from .scale import Scale
from .softcap import Softcap
from .states import GatedDelta, GatedNorm, Mamba2, NormAndGate, ShortConv, StateHeads, StateMixer
from .weight_slot import HasSlots, WeightSlot

__all__ = [
    "ACTIVATIONS",
    "EXPERT_GATES",
    "GATES",
    "HEAD_ACTIVATIONS",
    "MLP",
    "PLAIN",
    "Activation",
    "Attention",
    "CacheWriter",
    "ClampAndStore",
    "ClassHead",
    "ConvBlock",
    "DisentangledAttention",
    "DistanceBias",
    "DistanceTerms",
    "DistanceVectors",
    "EncoderAttention",
    "ExpertMLP",
    "Experts",
    "ExpertsLayer",
    "FeedForward",
    "GatedDelta",
    "GatedMLP",
    "GatedNorm",
    "HasSlots",
    "HeadLayerNorm",
    "HeadNorm",
    "Heads",
    "InputFormat",
    "InvariantLinear",
    "KVScales",
    "LatentAttention",
    "LatentSizes",
    "LayerNorm",
    "LayerNormPerHead",
    "LearnedPositions",
    "Linear",
    "LinearBase",
    "MLPBlock",
    "Mamba2",
    "MixerBlock",
    "NoNorm",
    "NoPositions",
    "NoTokenTypes",
    "Norm",
    "NormAndGate",
    "NormAndStore",
    "PackedWeight",
    "Packs",
    "ParallelBlock",
    "PlainMLP",
    "PostNormBlock",
    "PreNormBlock",
    "ProjectionNorm",
    "Quantized",
    "RMSNorm",
    "Reduce",
    "RelativeBias",
    "RotateAndStore",
    "Router",
    "RouterSpec",
    "Rows",
    "SandwichBlock",
    "Scale",
    "ScaleAndStore",
    "SharedTokenEmbedding",
    "ShortConv",
    "Softcap",
    "StateHeads",
    "StateMixer",
    "StoreOnly",
    "TextConv",
    "TokenEmbedding",
    "TokenMixer",
    "TokenTypes",
    "UpProjections",
    "WeightSlot",
    "rotary_table",
]

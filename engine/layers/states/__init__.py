"""Layers that keep states of fixed size of a sequence, in place of keys and values, and their parts."""

from __future__ import annotations

from typing import TypeAlias

from .gated_delta import GatedDelta
from .gated_norm import GatedNorm, NormAndGate
from .heads import StateHeads
from .mamba import Mamba2
from .short_conv import ShortConv

__all__ = ["GatedDelta", "GatedNorm", "Mamba2", "NormAndGate", "ShortConv", "StateHeads", "StateMixer"]

StateMixer: TypeAlias = Mamba2 | GatedDelta
"""A layer that keeps the last inputs of a convolution and the matrices of a recurrence."""

"""Layers that keep states of fixed size of a sequence, in place of keys and values, and their parts."""

from __future__ import annotations

from .gated_norm import GatedNorm
from .mamba import Mamba2, StateHeads
from .short_conv import ShortConv

__all__ = ["GatedNorm", "Mamba2", "ShortConv", "StateHeads"]

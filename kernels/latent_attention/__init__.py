"""Attention over latents: one vector a token, which all heads share and of which keys and values are made."""

from __future__ import annotations

from .op import latent_attention

__all__ = ["latent_attention"]

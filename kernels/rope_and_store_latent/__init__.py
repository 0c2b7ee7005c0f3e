"""Norm of a latent, rotation by position, and the write to the cache of latents, in one pass."""

from __future__ import annotations

from .op import rope_and_store_latent

__all__ = ["rope_and_store_latent"]

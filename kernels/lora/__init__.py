"""The products of many LoRA adapters, added to the product of the matrix that they all change."""

from __future__ import annotations

from .op import lora

__all__ = ["lora"]

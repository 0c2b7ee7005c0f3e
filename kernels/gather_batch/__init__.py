"""The tensors of one step, gathered from the tables of all running requests."""

from __future__ import annotations

from .op import gather_batch

__all__ = ["gather_batch"]

"""The part of a draw that a rank computes from its columns of the logits."""

from __future__ import annotations

from .op import sample_shard

__all__ = ["sample_shard"]

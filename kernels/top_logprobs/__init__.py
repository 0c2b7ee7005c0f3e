"""Log-probabilities of the chosen and of the best tokens."""

from __future__ import annotations

from .op import top_logprobs

__all__ = ["top_logprobs"]

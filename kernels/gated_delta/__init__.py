"""The gated delta rule, see `op.gated_delta`."""

from __future__ import annotations

from .op import gated_delta

__all__ = ["gated_delta"]

"""The recurrence of Mamba-2, see `op.state_scan`."""

from __future__ import annotations

from .op import state_scan

__all__ = ["state_scan"]

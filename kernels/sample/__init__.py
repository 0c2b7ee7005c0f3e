"""Token sampling whose draws do not depend on the batch."""

from __future__ import annotations

from .op import sample

__all__ = ["sample"]

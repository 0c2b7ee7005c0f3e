"""The fallback: models without a family here run as transformers' own modules.

Those that generate have our paged attention inside them. Encoders compute whole texts, one by one or in one row.
"""

from __future__ import annotations

from .family import fallback_family
from .module_class import find_module_class

__all__ = ["fallback_family", "find_module_class"]

"""The fallback: models without a family here run as transformers' own modules, with our paged attention inside them."""

from __future__ import annotations

from .family import fallback_family
from .module_class import find_module_class

__all__ = ["fallback_family", "find_module_class"]

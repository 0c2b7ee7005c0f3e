"""The model families, one file each. The registry finds every module in this folder by its constant `FAMILIES`."""

from __future__ import annotations

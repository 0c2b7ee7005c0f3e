"""The check of a model folder: our outputs compared with those of transformers, and its tensors looked at."""

from __future__ import annotations

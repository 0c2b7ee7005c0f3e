"""The input of a job: which files, of which format, with which columns and how many rows; and the dataset of them."""

from __future__ import annotations

from .base import READ_ERROR, InputFile, Unit
from .source import Source

__all__ = ["READ_ERROR", "InputFile", "Source", "Unit"]

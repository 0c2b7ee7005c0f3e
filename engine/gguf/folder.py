"""The files of a model's folder, except for the weights, made from the header of a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..storage import Location
from .config import config_fields, generation_fields
from .header import read_headers
from .tokenizer import tokenizer_files

__all__ = ["write_gguf_config", "write_gguf_tokenizer"]


def write_gguf_config(files: Sequence[Location], folder: Path) -> None:
    """Writes config.json and generation_config.json to a folder.

    Args:
        files: The GGUF files of a model, the first one first.
        folder: The folder, which exists.

    Raises:
        CheckpointError: A file is damaged, or its metadata lacks a field.
        UnsupportedModelError: The architecture, or a value of the metadata, is not implemented.
    """
    header = read_headers(files)
    (folder / "config.json").write_text(json.dumps(config_fields(header)))
    (folder / "generation_config.json").write_text(json.dumps(generation_fields(header)))


def write_gguf_tokenizer(files: Sequence[Location], folder: Path) -> None:
    """Writes the files of a tokenizer to a folder; arguments and errors are those of `write_gguf_config`."""
    for name, text in tokenizer_files(read_headers(files[:1])).items():
        (folder / name).write_text(text, encoding="utf-8")

"""`CheckpointOutput`: the folder of a checkpoint that is written tensor by tensor and appears when it is whole.

A safetensors file begins with a header that says where each tensor is, so the usual writers hold all tensors of a file
in memory first. A header may end in spaces, though: room for it is left at the beginning of a file, and it is filled in
when the file is closed. So only one tensor is in memory.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ...errors import ConfigError, quote
from ...weights.remote import DTYPES, LENGTH_BYTES
from ...weights.sharded_state import copy_model_files

__all__ = ["CheckpointOutput", "new_checkpoint"]

HEADER_BYTES = 1 << 20
"""Room for the header of a file, its length included; a file without room for a further entry is closed."""

FILE_BYTES = 4 << 30
"""Size at which a file is closed and the next one begins."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}


class _File:
    """A safetensors file that is being written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO = path.open("wb")
        self._file.seek(HEADER_BYTES)
        self._entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._header_bytes = LENGTH_BYTES + len(json.dumps(self._entries))
        self.num_bytes = 0

    def add(self, name: str, tensor: Tensor) -> bool:
        """Writes a tensor; returns False, and writes nothing, if the file is full."""
        end = self.num_bytes + tensor.nbytes
        entry = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [self.num_bytes, end]}
        header_bytes = self._header_bytes + len(json.dumps({name: entry}))
        if header_bytes > HEADER_BYTES or (self.num_bytes and end > FILE_BYTES):
            return False
        plain = tensor.contiguous().cpu().reshape(-1)
        try:
            self._file.write(plain.view(torch.uint8).numpy().data if len(plain) else b"")
        except OSError as error:  # Such as a full disk.
            raise ConfigError(
                f"{quote(str(self.path.parent))} cannot be written ({error}); nothing is left of it: make room there, "
                "or pass another folder"
            ) from error
        self._entries[name], self._header_bytes, self.num_bytes = entry, header_bytes, end
        return True

    def close(self) -> list[str]:
        """Writes the header, and returns the names of all tensors."""
        header = json.dumps(self._entries).encode()
        with self._file:
            self._file.seek(0)
            self._file.write((HEADER_BYTES - LENGTH_BYTES).to_bytes(LENGTH_BYTES, "little"))
            self._file.write(header.ljust(HEADER_BYTES - LENGTH_BYTES))
        return [name for name in self._entries if name != "__metadata__"]


class CheckpointOutput:
    """A checkpoint that is being written.

    Args:
        folder: The folder, which exists and is empty.

    Attributes:
        folder: The folder.
        num_bytes: Bytes of all tensors so far.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.num_bytes = 0
        self._files = [_File(folder / "part-0")]

    def add(self, name: str, tensor: Tensor) -> None:
        """Writes a tensor."""
        if not self._files[-1].add(name, tensor):
            self._files.append(_File(self.folder / f"part-{len(self._files)}"))
            self._files[-1].add(name, tensor)
        self.num_bytes += tensor.nbytes

    def write_json(self, name: str, content: Any) -> None:
        """Writes a JSON file."""
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (self.folder / name).write_text(text + "\n", encoding="utf-8")

    def finish(self, config: dict[str, Any]) -> None:
        """Closes the files of tensors, gives them their names, and writes their index and config.json.

        Args:
            config: The content of config.json.
        """
        places: dict[str, str] = {}
        for index, file in enumerate(self._files, 1):
            single = len(self._files) == 1
            name = "model.safetensors" if single else f"model-{index:05d}-of-{len(self._files):05d}.safetensors"
            places |= dict.fromkeys(file.close(), name)
            file.path.rename(self.folder / name)
        if len(self._files) > 1:
            index_of = {"metadata": {"total_size": self.num_bytes}, "weight_map": places}
            self.write_json("model.safetensors.index.json", index_of)
        self.write_json("config.json", config)


@contextmanager
def new_checkpoint(source: Path, target: Path) -> Iterator[CheckpointOutput]:
    """Makes a folder of a checkpoint, which appears under its name when the `with` block has ended without an error.

    Args:
        source: Folder whose small files, such as those of the tokenizer, the new folder gets as well.
        target: The folder; it does not exist, or is empty.

    Raises:
        ConfigError: The folder holds files, cannot be written, or cannot be replaced.
    """
    try:
        target = target.resolve()  # A link to an empty folder would not be replaced.
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ConfigError(f"{quote(str(target))} exists and is not empty; pass the name of a new folder")
        if target.is_mount() or target == Path.cwd():
            raise ConfigError(
                f"{quote(str(target))} is in use and cannot be replaced; pass the name of a new folder in it"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise ConfigError(f"{quote(str(target))} cannot be written ({error}); pass another folder") from error
    try:
        copy_model_files(source, unfinished)
        for folder in source.iterdir():  # Those of sentence-transformers, such as `1_Pooling`.
            if folder.is_dir() and folder.name[0].isdigit():
                shutil.copytree(folder, unfinished / folder.name)
        yield CheckpointOutput(unfinished)
        unfinished.chmod(0o755)  # That of `mkdtemp` is for one user alone.
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)

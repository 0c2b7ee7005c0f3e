"""`read_headers`: the metadata of a GGUF file, and the places of its tensors.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): the magic bytes, the version, two counts, the
metadata as typed values, an entry for each tensor, and the numbers of the tensors, each at a multiple of the alignment.
A header may come from anyone, so every length is compared with the size of the file before memory is taken for it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np

from ..errors import CheckpointError, ConfigError, UnsupportedModelError, quote
from ..storage import Location

__all__ = ["GgufHeader", "GgufTensorInfo", "block_type", "read_headers"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_ENTRIES = 1 << 20
"""Most values of the metadata, and most tensors."""

MAX_ITEMS = 1 << 22
"""Most items of an array in the metadata; the largest array is the vocabulary of a tokenizer."""

MAX_TEXT_BYTES = 1 << 24
MAX_DIMS, MAX_LENGTH = 4, 1 << 40
MAX_ALIGNMENT = 1 << 20

STRING, ARRAY = 8, 9
NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
"""Number of a type in the file -> numpy's name of the type."""


@dataclass(frozen=True, slots=True)
class GgufTensorInfo:
    """The entry of a tensor.

    Attributes:
        file: The file with its numbers.
        name: The tensor's name, e.g. `blk.0.attn_q.weight`.
        shape: Shape in the order of PyTorch: the last dimension is the one whose numbers lie one after another.
        type_name: Name of the type of its numbers or of its blocks, e.g. `Q4_1`.
        start: Offset of its numbers in the file, in bytes.
        num_bytes: Bytes of its numbers.
    """

    file: Location
    name: str
    shape: tuple[int, ...]
    type_name: str
    start: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The header of a GGUF file, or the headers of all files of a model that is split.

    Attributes:
        file: The file, or the first one, which has all metadata.
        metadata: Key -> a number, a bool, a text, or a list of them.
        tensors: The entries of all tensors.
    """

    file: Location
    metadata: Mapping[str, Any]
    tensors: tuple[GgufTensorInfo, ...]

    @property
    def architecture(self) -> Any:
        """The value of `general.architecture`."""
        return self.metadata.get("general.architecture")

    def own(self, key: str, default: Any = None) -> Any:
        """Returns a value of the architecture: that of `llama.block_count` for `block_count`."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def has(self, name: str) -> bool:
        """Returns whether there is a tensor of this name."""
        return any(tensor.name == name for tensor in self.tensors)


def block_type(type_name: str) -> tuple[Any, int, int]:
    """Returns a type of the package `gguf`, the numbers in a block of it, and the bytes of a block.

    Raises:
        ConfigError: The package is not installed.
    """
    try:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError as error:
        raise ConfigError("GGUF files are read with the package gguf: pip install 'millrace[gguf]'") from error
    kind = GGMLQuantizationType[type_name]
    return kind, *GGML_QUANT_SIZES[kind]


def read_headers(files: Sequence[Location]) -> GgufHeader:
    """Reads the headers of the GGUF files of a model.

    Args:
        files: The file, here or behind a URL; or all files of a model that is split, the first one first.

    Raises:
        CheckpointError: A file is missing, truncated or damaged, or is no GGUF file.
        UnsupportedModelError: A file has an unknown version, or numbers of an unknown type.
        ConfigError: The package `gguf` is not installed.
    """
    first, *others = [_read_header(file) for file in files]
    tensors = {tensor.name: tensor for tensor in first.tensors}
    for tensor in (tensor for header in others for tensor in header.tensors):
        if tensor.name in tensors:
            raise CheckpointError(
                f"{tensor.file}: {tensor.name!r:.80} is in an earlier file too; fetch the files again"
            )
        tensors[tensor.name] = tensor
    return replace(first, tensors=tuple(tensors.values()))


def _read_header(file: Location) -> GgufHeader:
    try:
        size = file.size()
        with file.open_input(size=size) as opened:
            return _Reader(file, opened, size).read()
    except (ConfigError, CheckpointError, UnsupportedModelError):
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} does not exist; check the path") from error
    except (ValueError, KeyError, struct.error) as error:
        raise CheckpointError(
            f"{file} is truncated, damaged or no GGUF file ({error!s:.300}); fetch it again"
        ) from error


class _Reader:
    """Reads the header from a file, front to back."""

    def __init__(self, file: Location, opened: BinaryIO, size: int) -> None:
        self._file, self._opened, self._size = file, opened, size
        self._position = 0

    def read(self) -> GgufHeader:
        if self._bytes(len(MAGIC)) != MAGIC:
            raise ValueError(f"it does not begin with {MAGIC.decode()}")
        version = self._number("<u4")
        if version not in VERSIONS:
            raise UnsupportedModelError(f"{self._file} is GGUF of version {version}; versions 2 and 3 are read")
        num_tensors, num_values = self._count(MAX_ENTRIES), self._count(MAX_ENTRIES)
        metadata: dict[str, Any] = {}
        for _ in range(num_values):
            key = self._text()
            if key in metadata:
                raise ValueError(f"the key {key!r:.80} is there twice")
            metadata[key] = self._value(self._number("<u4"))
        entries = [self._entry() for _ in range(num_tensors)]
        return GgufHeader(self._file, metadata, self._place(entries, metadata.get("general.alignment", 32)))

    def _bytes(self, count: int) -> bytes:
        if count > self._size - self._position:
            raise ValueError(f"{count} bytes are announced at byte {self._position} of {self._size}")
        data = self._opened.read(count)
        if len(data) != count:
            raise ValueError(f"the file ends at byte {self._position + len(data)}")
        self._position += count
        return data

    def _number(self, dtype: str) -> Any:
        return np.frombuffer(self._bytes(np.dtype(dtype).itemsize), dtype)[0].item()

    def _count(self, most: int) -> int:
        (count,) = struct.unpack("<Q", self._bytes(8))
        if count > most:
            raise ValueError(f"a count of {count} at byte {self._position - 8}; at most {most} are read")
        return int(count)

    def _text(self) -> str:
        return self._bytes(self._count(MAX_TEXT_BYTES)).decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._text()
        if kind in NUMBERS:
            return self._number(NUMBERS[kind])
        if kind != ARRAY:
            raise ValueError(f"the metadata has a value of the unknown type {kind}")
        item_kind, count = self._number("<u4"), self._count(MAX_ITEMS)
        if item_kind == STRING:
            return [self._text() for _ in range(count)]
        dtype = np.dtype(NUMBERS[item_kind])
        return np.frombuffer(self._bytes(count * dtype.itemsize), dtype).tolist()

    def _entry(self) -> tuple[str, tuple[int, ...], str, int]:
        """Reads the entry of a tensor: name, shape, type and offset."""
        name, num_dims = self._text(), self._number("<u4")
        if not 0 < num_dims <= MAX_DIMS:
            raise ValueError(f"{name!r:.80} has {num_dims} dimensions")
        shape = tuple(self._count(MAX_LENGTH) for _ in range(num_dims))
        return name, shape[::-1], self._type_name(name), self._number("<u8")

    def _type_name(self, name: str) -> str:
        from_package, *_ = block_type("F32")
        number = self._number("<u4")
        try:
            return str(type(from_package)(number).name)
        except ValueError as error:
            raise UnsupportedModelError(
                f"{self._file}: {name!r:.80} holds numbers of type {number}, which the installed gguf does not know"
            ) from error

    def _place(self, entries: list[Any], alignment: Any) -> tuple[GgufTensorInfo, ...]:
        """Returns the entries with their places; they must lie one after another, each at the next aligned byte."""
        if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {quote(alignment)}")
        if len({name for name, *_ in entries}) < len(entries):
            raise ValueError("a name of a tensor is there twice")
        begin = _aligned(self._position, alignment)
        placed, end = [], 0
        for name, shape, type_name, offset in sorted(entries, key=lambda entry: entry[3]):
            _, block_size, block_bytes = block_type(type_name)
            if offset != _aligned(end, alignment):
                raise ValueError(f"{name!r:.80} begins at byte {offset} of the data, and not after byte {end}")
            if shape[-1] % block_size:
                raise ValueError(f"{name!r:.80} of {list(shape)} is not a number of whole blocks of {block_size}")
            num_bytes = math.prod(shape) // block_size * block_bytes
            end = offset + num_bytes
            if begin + end > self._size:
                raise ValueError(f"{name!r:.80} ends at byte {begin + end} of {self._size}")
            placed.append(GgufTensorInfo(self._file, name, shape, type_name, begin + offset, num_bytes))
        return tuple(placed)


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment

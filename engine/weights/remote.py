"""`iter_remote_tensors`: the tensors of safetensors files behind a URL, whose numbers are read when they are needed.

The header of a file says where the numbers of each tensor are. No file is copied to a disk.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from ..errors import CheckpointError
from ..storage import Location
from .file_tensor import FileTensor, PlainRows

__all__ = ["iter_remote_tensors", "read_metadata"]

NUM_THREADS = 16  # The threads mostly wait for answers of a store.
LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100 << 20
MAX_DIMS, MAX_LENGTH = 8, 1 << 40
"""Most dimensions of a tensor, and most elements in one of them; a product of lengths with a 0 in it bounds none."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def iter_remote_tensors(files: Sequence[Location]) -> Iterator[tuple[str, FileTensor]]:
    """Yields every (name, tensor) of safetensors files. Only the headers are read, several of them at once.

    Args:
        files: Safetensors files.

    Raises:
        CheckpointError: A file is damaged.
    """
    with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="millrace-headers") as pool:
        for tensors in pool.map(_locate_tensors, files):
            yield from tensors.items()


def read_metadata(file: Location) -> dict[str, str]:
    """Returns the `__metadata__` of a safetensors file; empty if it has none.

    Raises:
        CheckpointError: The file is damaged.
    """
    metadata = _read_header(file, file.size()).get("__metadata__", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{file} is damaged: its __metadata__ is {metadata!r:.80}; store it again")
    return metadata


def _locate_tensors(file: Location) -> dict[str, FileTensor]:
    size = file.size()
    header = _read_header(file, size)
    header.pop("__metadata__", None)
    try:
        num_bytes = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        begin = size - num_bytes
        tensors = {name: _locate(file, begin, name, **entry) for name, entry in header.items()}
        _check_places(header)
        return tensors
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{file} is damaged ({error!r:.300}); store it again") from error


def _locate(file: Location, begin: int, name: str, dtype: str, shape: list[int], data_offsets: list[int]) -> FileTensor:
    """Makes a tensor from its header entry (`dtype`, `shape`, `data_offsets`); the file's data start at `begin`."""
    start, stop = data_offsets
    if len(shape) > MAX_DIMS or not all(type(size) is int and 0 <= size <= MAX_LENGTH for size in shape):
        raise ValueError(f"{name!r:.80} has the shape {shape!r:.80}")
    num_bytes = DTYPES[dtype].itemsize * math.prod(shape)
    if stop - start != num_bytes:
        raise ValueError(f"{name!r:.80} of {shape} has {stop - start} bytes instead of {num_bytes}")
    return FileTensor.whole(file, begin + start, shape, DTYPES[dtype], PlainRows(DTYPES[dtype]))


def _check_places(header: dict[str, Any]) -> None:
    """Raises if the tensors do not lie in the file one after another, without a gap and without an overlap."""
    end = 0
    for start, stop in sorted(entry["data_offsets"] for entry in header.values()):
        if start != end:
            raise ValueError(f"the bytes {start} to {stop} of a tensor do not follow byte {end}")
        end = stop


def _read_header(file: Location, size: int) -> dict[str, Any]:
    """Returns a safetensors file's header; raises `CheckpointError` if it implies another file size than `size`."""
    (length,) = struct.unpack("<Q", file.read_bytes(0, min(LENGTH_BYTES, size)).ljust(LENGTH_BYTES, b"\xff"))
    begin = LENGTH_BYTES + length
    if begin > min(size, MAX_HEADER_BYTES):
        raise CheckpointError(f"{file} is truncated, or is no safetensors file; store it again")
    try:
        header: dict[str, Any] = json.loads(file.read_bytes(LENGTH_BYTES, begin))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged ({error!r:.300}); store it again") from error
    if size != begin + max(ends, default=0):
        raise CheckpointError(f"{file} is truncated: {size} bytes instead of {begin + max(ends, default=0)}")
    return header

"""`read_files`: the config and the tensors of an adapter's folder, here or behind a URL.

The files come from a stranger. Their sizes are known before they are read, each is read once, and a pickle may hold
nothing but tensors.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from ..errors import AdapterError, quote
from ..loading.hub import HubSettings, fetch_adapter, is_hub_name
from ..storage import Location, read_json_object

__all__ = ["AdapterFiles", "locate_adapter", "read_files"]

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""Files of tensors in order of preference."""

MAX_CONFIG_BYTES = 1 << 20
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, slots=True, eq=False)
class AdapterFiles:
    """The content of an adapter's files.

    Attributes:
        fields: The fields of `adapter_config.json`.
        tensors: Name -> tensor, of a floating-point type, in the memory of the host.
        digest: Hash of the content of the files.
    """

    fields: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    digest: bytes


def locate_adapter(path: str, download_dir: str | None = None) -> Location:
    """Returns the folder of an adapter.

    Args:
        path: A local folder, a URL, or the name of a repository of a hub (`org/name`). A local folder wins over a name.
        download_dir: Folder of the cache for downloads from a hub; None for that of the hub's library.

    Raises:
        AdapterError: The path is none of these.
        ConfigError: The repository does not exist, or may not be read.
        StorageError: The hub cannot be reached.
    """
    try:
        is_folder = "://" in path or Path(path).expanduser().is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # The name is too long, or no home folder is known.
        raise AdapterError(f"lora_path {quote(path)} is no path of a folder: {error!s:.100}") from error
    if path and is_folder:
        return Location.at(path)
    if is_hub_name(path):
        return Location.at(fetch_adapter(path, HubSettings(download_dir=download_dir)))
    raise AdapterError(
        f"lora_path {quote(path)} is no local folder; pass the path or the URL (s3://, gs://, hf://) of a folder that "
        f"holds {CONFIG} and {WEIGHTS[0]}, or a name on a hub (org/name)"
    )


def read_files(folder: Location, max_bytes: int) -> AdapterFiles:
    """Reads the files of an adapter.

    Args:
        folder: Folder of the adapter.
        max_bytes: Most bytes that the file of tensors may have.

    Raises:
        AdapterError: A file is missing, too large or damaged, or holds anything but tensors of floating-point numbers.
        CheckpointError: The config is no JSON object.
        ConfigError: A file is a pipe or a device, or may not be read.
        StorageError: The store behind a URL failed in all attempts.
    """
    config, weights = folder / CONFIG, [folder / name for name in WEIGHTS]
    file = next((one for one in weights if one.exists()), None)
    if file is None or not config.exists():
        raise AdapterError(_missing(folder, CONFIG if file is not None else f"{CONFIG} and {WEIGHTS[0]}"))
    _check_size(config, MAX_CONFIG_BYTES)
    fields, data = read_json_object(config), file.read_bytes(0, _check_size(file, max_bytes))
    tensors = _tensors(file, data)
    content = hashlib.blake2b(json.dumps(fields, sort_keys=True).encode(), digest_size=16)
    content.update(data)
    return AdapterFiles(fields, tensors, content.digest())


def _missing(folder: Location, needed: str) -> str:
    """Returns the message about a folder without a file; PEFT saves an adapter with a name in a subfolder."""
    inside = sorted(one.name for one in folder.list())
    below = [name for name in inside[:20] if (folder / name / CONFIG).exists()]
    advice = f"; its subfolder {quote(below[0])} holds an adapter: pass that" if below else ""
    return f"{folder} does not hold {needed}; it holds {quote(', '.join(inside) or 'nothing')}{advice}"


def _check_size(file: Location, max_bytes: int) -> int:
    """Returns the size of a file in bytes."""
    size = file.size()
    if size > max_bytes:
        raise AdapterError(
            f"{file} has {size:,} bytes, and at most {max_bytes:,} can belong to an adapter of this model under "
            "max_lora_rank; check that it is an adapter's file, or raise max_lora_rank"
        )
    return size


def _tensors(file: Location, data: bytes) -> Mapping[str, Tensor]:
    if data.startswith(LFS_POINTER):
        raise AdapterError(f"{file} is a Git LFS pointer, not the adapter; run `git lfs pull` in its folder")
    try:
        tensors = load_safetensors(data) if file.name == WEIGHTS[0] else _load_pickle(data)
    except Exception as error:  # A damaged file raises errors of any type.
        raise AdapterError(
            f"{file} is truncated, damaged or not just tensors ({type(error).__name__}: {error!s:.300}); save the "
            "adapter again with save_pretrained of PEFT, as safetensors"
        ) from error
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise AdapterError(
                f"{quote(name)} in {file} is of {tensor.dtype}; an adapter holds float16, bfloat16, float32 or float64"
            )
    return tensors


def _load_pickle(data: bytes) -> Mapping[str, Tensor]:
    """Returns the tensors of a pickle, of which nothing is executed."""
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > len(data):
                raise ValueError("the archive is compressed, and torch.save compresses nothing")
    try:
        tensors = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # The message of PyTorch advises to load without the check, before it says what is wrong.
        raise ValueError(str(error.__context__ or error).partition(". ")[0]) from error
    plain = isinstance(tensors, dict) and all(isinstance(name, str) for name in tensors)
    if not plain or not all(type(one) in (Tensor, nn.Parameter) and _is_dense(one) for one in tensors.values()):
        raise ValueError("it is no mapping of names to dense tensors")
    return tensors


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized

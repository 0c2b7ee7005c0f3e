"""`resolve_model`: finds a model on this machine, inside the package, or behind a URL: a folder, or a GGUF file."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

from ..errors import ConfigError, quote
from ..gguf.files import SUFFIX, find_gguf
from ..gguf.folder import write_gguf_config, write_gguf_tokenizer
from ..storage import FileInfo, Location

PACKAGE = Path(__file__).resolve().parent.parent.parent

BUNDLED = {"invoices": PACKAGE / "examples" / "invoices" / "model"}
"""Name -> folder of each model that is part of the package."""

PREFIX = "bundled:"

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
NUM_THREADS = 8

Folder: TypeAlias = tempfile.TemporaryDirectory[str]
"""A temporary folder, which is removed when the process ends."""


def locate_model(model: str) -> Location:
    """Returns the location of a model's weights.

    Args:
        model: A local folder, a GGUF file, ``"bundled:NAME"``, or a URL of a folder or of a GGUF file.

    Returns:
        The folder; for a GGUF model its file, or the first one if it is split.

    Raises:
        ConfigError: The local folder or the bundled model does not exist, or a folder holds several GGUF models.
        CheckpointError: A part of a GGUF model is missing.
    """
    place = _place(model, "model")
    files = find_gguf(place)
    return files[0] if files else place


def resolve_model(model: str, what: str = "model") -> Path:
    """Returns a local folder with a model's config and generation config, and the tokenizer unless it is a GGUF model.

    Args:
        model: As in `locate_model`.
        what: Name of the argument in error messages.

    Returns:
        The folder. For a model behind a URL, it is a temporary folder with copies of all files except for the weights;
        for a GGUF model, it is one with files made from the header of its file. `locate_model` says where the weights
        are, and `resolve_tokenizer` where the tokenizer is.

    Raises:
        ConfigError: The folder does not exist, or the store behind the URL denies access.
        CheckpointError: A GGUF file is damaged, or a part of it is missing.
        UnsupportedModelError: The architecture of a GGUF file is not implemented.
    """
    place = _place(model, what)
    files = find_gguf(place)
    if files:
        return Path(_gguf_files(tuple(files), write_gguf_config).name)
    return Path(place.url) if place.is_local else Path(_copy_small_files(place, what).name)


def resolve_tokenizer(model: str, what: str = "model") -> Path:
    """Returns a local folder with a tokenizer; arguments and errors are those of `resolve_model`."""
    files = find_gguf(_place(model, what))
    return Path(_gguf_files(tuple(files), write_gguf_tokenizer).name) if files else resolve_model(model, what)


def _place(model: str, what: str) -> Location:
    """Returns the location of a folder or of a GGUF file."""
    if model.startswith(PREFIX):
        name = model.removeprefix(PREFIX)
        if name not in BUNDLED:
            raise ConfigError(f"no bundled model is called {name!r}; there is: {', '.join(sorted(BUNDLED))}")
        return Location.at(BUNDLED[name])
    if "://" in model:
        return Location.at(model)
    try:
        path = Path(model).expanduser()
        if path.is_dir() or (path.suffix == SUFFIX and path.is_file()):
            return Location.at(path)
    except (OSError, RuntimeError, ValueError) as error:  # The name is too long, or no home folder is known.
        raise ConfigError(f"{what} {quote(model)} is no path of a folder: {error!s:.100}") from error
    raise ConfigError(
        f"{what} {quote(model)} is not a local folder or GGUF file; pass the path or the URL (s3://, gs://, hf://) of "
        f"a folder that holds config.json and the weights, or {PREFIX}{next(iter(BUNDLED))!s}"
    )


@functools.cache  # A process makes the files of a model once.
def _gguf_files(files: tuple[Location, ...], write: Callable[[Sequence[Location], Path], None]) -> Folder:
    """Writes files that are made from the header of a GGUF file to a new temporary folder."""
    folder: Folder = tempfile.TemporaryDirectory(prefix="millrace-gguf-")
    write(files, Path(folder.name))
    return folder


@functools.cache  # A process needs only one copy of a model's files.
def _copy_small_files(place: Location, what: str) -> Folder:
    """Copies the files behind a URL, except weights, to a new temporary folder, where transformers can read them."""
    infos = [info for info in place.files.children(place.url) if not info.is_dir]
    if not infos:
        raise ConfigError(f"{what} {place.url!r} does not exist, or is no folder with files; check the URL")
    small = [info for info in infos if not info.url.endswith(WEIGHTS)]
    folder: Folder = tempfile.TemporaryDirectory(prefix="millrace-model-")

    def copy(info: FileInfo) -> None:
        file = Location(info.url, place.options)
        Path(folder.name, file.name).write_bytes(file.read_bytes(0, info.size))

    with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="millrace-model") as pool:
        list(pool.map(copy, small))
    return folder

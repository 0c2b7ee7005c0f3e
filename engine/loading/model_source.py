"""`resolve_model`: finds a model on this machine, inside the package, behind a URL or on a hub."""

from __future__ import annotations

import functools
import logging
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

from ..errors import ConfigError, quote
from ..gguf.files import SUFFIX, find_gguf
from ..gguf.folder import write_gguf_config, write_gguf_tokenizer
from ..storage import FileInfo, Location
from .hub import HubSettings, fetch_model, is_hub_name

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).resolve().parent.parent.parent

BUNDLED = {"invoices": PACKAGE / "examples" / "invoices" / "model"}
"""Name -> folder of each model that is part of the package."""

PREFIX = "bundled:"

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
NUM_THREADS = 8
NEWEST = HubSettings()

Folder: TypeAlias = tempfile.TemporaryDirectory[str]
"""A temporary folder, which is removed when the process ends."""


def locate_model(model: str, hub: HubSettings = NEWEST, *, with_weights: bool = True) -> Location:
    """Returns the location of a model's weights.

    Args:
        model: A local folder, a GGUF file, ``"bundled:NAME"``, a URL of a folder or of a GGUF file, or a name on a hub
            (``"org/name"``, ``"org/name/file.gguf"``). A local folder wins over a name.
        hub: Settings of a download from a hub.
        with_weights: Whether the weights of a model of a hub are downloaded, and not only its small files.

    Returns:
        The folder; for a GGUF model its file, or the first one if it is split.

    Raises:
        ConfigError: The model does not exist, or may not be read, or a folder holds several GGUF models.
        CheckpointError: A part of a GGUF model is missing.
        StorageError: The hub or the store cannot be reached.
    """
    place = _place(model, hub, "model", with_weights=with_weights)
    files = find_gguf(place)
    return files[0] if files else place


def resolve_model(model: str, hub: HubSettings = NEWEST, what: str = "model") -> Path:
    """Returns a local folder with a model's config and generation config, and the tokenizer unless it is a GGUF model.

    Args:
        model: As in `locate_model`; weights are not downloaded.
        hub: As in `locate_model`.
        what: Name of the argument in error messages.

    Returns:
        The folder. For a model behind a URL, it is a temporary folder with copies of all files except for the weights;
        for a GGUF model, it is one with files made from the header of its file. `locate_model` says where the weights
        are, and `resolve_tokenizer` where the tokenizer is.

    Raises:
        ConfigError: The model does not exist, or may not be read.
        StorageError: The hub or the store cannot be reached.
        CheckpointError: A GGUF file is damaged, or a part of it is missing.
        UnsupportedModelError: The architecture of a GGUF file is not implemented.
    """
    place = _place(model, hub, what, with_weights=False)
    files = find_gguf(place)
    if files:
        return Path(_gguf_files(tuple(files), write_gguf_config).name)
    return Path(place.url) if place.is_local else Path(_copy_small_files(place, what).name)


def resolve_tokenizer(model: str, hub: HubSettings = NEWEST, what: str = "model") -> Path:
    """Returns a local folder with a tokenizer; arguments and errors are those of `resolve_model`."""
    files = find_gguf(_place(model, hub, what, with_weights=False))
    return Path(_gguf_files(tuple(files), write_gguf_tokenizer).name) if files else resolve_model(model, hub, what)


def warn_of_unused(model: str, hub: HubSettings) -> None:
    """Warns of settings for models of a hub beside a model that is none."""
    given = [name for name in ("revision", "download_dir") if getattr(hub, name) is not None]
    if given and (not is_hub_name(model) or Path(model).exists()):
        logger.warning("%s: ignored, because %s is not downloaded from a hub", ", ".join(given), quote(model))


def _place(model: str, hub: HubSettings, what: str, *, with_weights: bool) -> Location:
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
    if is_hub_name(model):
        return Location.at(fetch_model(model, hub, what, with_weights=with_weights))
    raise ConfigError(
        f"{what} {quote(model)} is not a local folder or GGUF file; pass the path or the URL (s3://, gs://, hf://) of "
        f"a folder that holds config.json and the weights, a name on a hub (org/name), or {PREFIX}{next(iter(BUNDLED))}"
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

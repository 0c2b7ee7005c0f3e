"""`resolve_model`: finds a model folder on this machine, inside the package, or behind a URL."""

from __future__ import annotations

import functools
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..errors import ConfigError, quote
from ..storage import FileInfo, Location

PACKAGE = Path(__file__).resolve().parent.parent.parent

BUNDLED = {"invoices": PACKAGE / "examples" / "invoices" / "model"}
"""Name -> folder of each model that is part of the package."""

PREFIX = "bundled:"


WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
NUM_THREADS = 8


def locate_model(model: str) -> Location:
    """Returns the location of a model's weights.

    Args:
        model: A local folder, ``"bundled:NAME"``, or a URL such as ``"s3://bucket/model"``.

    Raises:
        ConfigError: The local folder or the bundled model does not exist.
    """
    return Location.at(model) if "://" in model else Location.at(resolve_model(model))


def resolve_model(model: str, what: str = "model") -> Path:
    """Returns a local folder with a model's config and tokenizer.

    Args:
        model: A local folder, ``"bundled:NAME"``, or a URL such as ``"s3://bucket/model"``.
        what: Name of the argument in error messages.

    Returns:
        The folder. For a model behind a URL, it is a temporary folder with copies of all files except for the weights.
        It is removed when the process ends. `locate_model` says where the weights are.

    Raises:
        ConfigError: The folder does not exist, or the store behind the URL denies access.
    """
    if model.startswith(PREFIX):
        name = model.removeprefix(PREFIX)
        if name not in BUNDLED:
            raise ConfigError(f"no bundled model is called {name!r}; there is: {', '.join(sorted(BUNDLED))}")
        return BUNDLED[name]
    if "://" in model:
        return Path(_copy_small_files(model, what).name)
    try:
        folder = Path(model).expanduser()
        if folder.is_dir():
            return folder
    except (OSError, RuntimeError, ValueError) as error:  # The name is too long, or no home folder is known.
        raise ConfigError(f"{what} {quote(model)} is no path of a folder: {error!s:.100}") from error
    raise ConfigError(
        f"{what} {quote(model)} is not a local folder; pass the path or the URL (s3://, gs://, hf://) of a folder that "
        f"holds config.json and the weights, or {PREFIX}{next(iter(BUNDLED))!s}"
    )


@functools.cache  # A process needs only one copy of a model's files.
def _copy_small_files(url: str, what: str) -> tempfile.TemporaryDirectory[str]:
    """Copies the files behind a URL, except weights, to a new temporary folder, where transformers can read them."""
    place = Location.at(url)
    infos = [info for info in place.files.children(place.url) if not info.is_dir]
    if not infos:
        raise ConfigError(f"{what} {url!r} does not exist, or is no folder with files; check the URL")
    small = [info for info in infos if not info.url.endswith(WEIGHTS)]
    folder: tempfile.TemporaryDirectory[str] = tempfile.TemporaryDirectory(prefix="millrace-model-")

    def copy(info: FileInfo) -> None:
        file = Location(info.url, place.options)
        Path(folder.name, file.name).write_bytes(file.read_bytes(0, info.size))

    with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="millrace-model") as pool:
        list(pool.map(copy, small))
    return folder

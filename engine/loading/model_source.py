"""Finds a model: a local folder, one that ships inside the package, or one behind a URL."""

from __future__ import annotations

import functools
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..errors import ConfigError
from ..storage import FileInfo, Location

PACKAGE = Path(__file__).resolve().parent.parent.parent

BUNDLED = {"invoices": PACKAGE / "examples" / "invoices" / "model"}
"""Name -> folder of the models that ship with Millrace."""

PREFIX = "bundled:"


WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
NUM_THREADS = 8


def locate_model(model: str) -> Location:
    """Finds where a model's weights are.

    Args:
        model: A local folder, ``"bundled:NAME"``, or a URL such as ``"s3://bucket/model"``.

    Raises:
        ConfigError: There is no such folder.
    """
    return Location.at(model) if "://" in model else Location.at(resolve_model(model))


def resolve_model(model: str, what: str = "model") -> Path:
    """Finds the folder with a model's config and tokenizer.

    Args:
        model: A local folder, ``"bundled:NAME"``, or a URL such as ``"s3://bucket/model"``.
        what: How an error names it.

    Returns:
        The folder. Of a model behind a URL it is one of this process, removed when that ends, and has no weights:
        those are read from where they are (`locate_model`).

    Raises:
        ConfigError: There is no such folder, or it cannot be reached.
    """
    if model.startswith(PREFIX):
        name = model.removeprefix(PREFIX)
        if name not in BUNDLED:
            raise ConfigError(f"no bundled model is called {name!r}; there is: {', '.join(sorted(BUNDLED))}")
        return BUNDLED[name]
    if "://" in model:
        return Path(_copy_small_files(model, what).name)
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    raise ConfigError(
        f"{what} {model!r} is not a local folder; pass the path or the URL (s3://, gs://, hf://) of a folder that "
        f"holds config.json and the weights, or {PREFIX}{next(iter(BUNDLED))!s}"
    )


@functools.cache  # One copy for a process, whoever asks.
def _copy_small_files(url: str, what: str) -> tempfile.TemporaryDirectory[str]:
    """Copies what transformers reads by path: everything beside the weights."""
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

"""`fetch_model`: the files of a model of a hub, downloaded into a cache on this machine unless they are there.

The hub is Hugging Face's, or ModelScope's if the environment asks for it. Both libraries take their credentials, and
Hugging Face's also its address and its cache, from the environment.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..env import hub_is_offline, use_modelscope
from ..errors import ConfigError, MillraceError, StorageError, quote
from ..gguf.files import SPLIT, SUFFIX

__all__ = ["HubSettings", "fetch_adapter", "fetch_model", "is_hub_name"]

NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(/[\w./-]+\.gguf)?")
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", "*_Dense/*")
"""Everything but the weights of the transformer; the layers after it, of sentence-transformers, are small."""

WEIGHTS = ("*.safetensors", "*.bin")
"""Weights in order of preference; the second ones are downloaded only if there are none of the first."""

ADAPTER_TEXTS = ("chat_template.jinja", "tokenizer_config.json", "added_tokens.json")
ADAPTER = (*ADAPTER_TEXTS, "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
"""Files of a LoRA adapter; the last one is downloaded only if there is none before it."""

UNUSED = ("original/*", "consolidated*", "onnx/*", "openvino/*")
"""Further copies of weights in other layouts, which repositories have beside the ones that are read."""


@dataclass(frozen=True, slots=True)
class HubSettings:
    """Settings of downloads from a hub.

    Attributes:
        revision: Branch, tag or commit; None for the newest version.
        download_dir: Folder of the cache; None for that of the hub's library.
    """

    revision: str | None = None
    download_dir: str | None = None


def is_hub_name(model: str) -> bool:
    """Returns whether a text has the form of a name on a hub: ``"org/name"``, or ``"org/name/file.gguf"``."""
    return NAME.fullmatch(model) is not None and ".." not in model


def fetch_model(name: str, settings: HubSettings, what: str = "model", *, with_weights: bool = True) -> Path:
    """Returns the path of a model on this machine, after its files are downloaded. Progress bars show downloads.

    Args:
        name: ``"org/name"``, or ``"org/name/file.gguf"`` for one GGUF file of a repository.
        settings: Settings of the download.
        what: Name of the argument in error messages.
        with_weights: Whether weights are downloaded too. A GGUF file always is.

    Returns:
        The folder, or the GGUF file.

    Raises:
        ConfigError: The repository, the revision or the file does not exist, access is denied, or the hub is switched
            off and the cache lacks files.
        StorageError: The hub cannot be reached.
    """
    repository, file = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    try:
        if file:
            return _fetch_file(repository, file, settings)
        folder = _fetch(repository, settings, SMALL_FILES)
        if what == "model" and not (folder / "config.json").exists():
            raise ConfigError(
                f"{what} {name!r}: the repository holds no config.json; of a repository of GGUF files name one, as in "
                f"{name}/FILE{SUFFIX}"
            )
        return _fetch_weights(repository, settings) if with_weights else folder
    except MillraceError:
        raise
    except Exception as error:  # The libraries of the hubs raise errors of many types.
        raise _explained(what, repository, settings, error) from error


def fetch_adapter(name: str, settings: HubSettings) -> Path:
    """Returns the folder of a LoRA adapter on this machine, after its files are downloaded.

    Args:
        name: ``"org/name"``.
        settings: Settings of the download.

    Raises:
        ConfigError: The repository does not exist, access is denied, or the hub is switched off and the cache lacks
            files.
        StorageError: The hub cannot be reached.
    """
    try:
        folder = _fetch(name, settings, ADAPTER[:-1])
        return folder if (folder / ADAPTER[-2]).exists() else _fetch(name, settings, ADAPTER)
    except MillraceError:
        raise
    except Exception as error:  # The libraries of the hubs raise errors of many types.
        raise _explained("adapter", name, settings, error) from error


def _fetch_file(repository: str, file: str, settings: HubSettings) -> Path:
    split = SPLIT.fullmatch(file)
    folder = _fetch(repository, settings, (f"{split['stem']}-*-of-{split['count']}{SUFFIX}" if split else file,))
    if not (folder / file).exists():
        raise ConfigError(f"the repository {repository!r} holds no file {file!r}; look at its list of files")
    return folder / file


def _fetch_weights(repository: str, settings: HubSettings) -> Path:
    for pattern in WEIGHTS:
        folder = _fetch(repository, settings, (*SMALL_FILES, pattern))
        if any(folder.glob(f"model{pattern}")) or any(folder.glob(f"pytorch_model{pattern}")):
            break
    return folder


@functools.cache  # A process asks the hub once.
def _fetch(repository: str, settings: HubSettings, patterns: Sequence[str]) -> Path:
    """Downloads the files of a repository whose names match one of the patterns; returns the folder with all files."""
    given = {"revision": settings.revision, "cache_dir": settings.download_dir}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    options |= {"allow_patterns": list(patterns), "ignore_patterns": list(UNUSED)}
    if use_modelscope():
        try:
            from modelscope.hub.snapshot_download import snapshot_download as from_modelscope
        except ImportError as error:
            raise ConfigError(
                "MILLRACE_USE_MODELSCOPE is set, and the package modelscope is not installed: pip install modelscope"
            ) from error
        return Path(from_modelscope(repository, **options, local_files_only=hub_is_offline()))
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repository, **options))


def _explained(what: str, name: str, settings: HubSettings, error: Exception) -> MillraceError:
    """Returns the error that says what to do about an error of a hub's library, which is known by its name."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    reason = " ".join(str(error).split())
    begin = f"{what} {quote(name)} is no local folder, and"
    if "GatedRepoError" in kinds:
        return ConfigError(
            f"{begin} the repository of this name is gated; ask for access on its page, and set HF_TOKEN to a token of "
            "an account that has it"
        )
    if "RevisionNotFoundError" in kinds:
        return ConfigError(f"{begin} the repository of this name has no revision {quote(settings.revision)}")
    if "RepositoryNotFoundError" in kinds:
        return ConfigError(
            f"{begin} no public repository of this name is on the hub; check the path or the name, and set HF_TOKEN if "
            "the repository is private"
        )
    if hub_is_offline():
        return ConfigError(
            f"{begin} the cache of the hub lacks files of this name while HF_HUB_OFFLINE is set; download them first "
            f"(hf download {name}), or pass the path of a folder"
        )
    if isinstance(error, OSError) or "ConnectError" in kinds:
        return StorageError(
            f"{begin} the hub cannot be reached ({reason[:200]}); check the path and the network, or download the "
            "model elsewhere and pass the path of its folder"
        )
    return ConfigError(f"{begin} the hub refuses it: {reason[:300]}")

"""`find_gguf`: the GGUF files of a model, which a path or a folder names."""

from __future__ import annotations

import re

from ..errors import CheckpointError, ConfigError
from ..storage import Location

__all__ = ["SUFFIX", "find_gguf"]

SUFFIX = ".gguf"
SPLIT = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
OTHER_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
MAX_LISTED = 20


def find_gguf(place: Location) -> list[Location]:
    """Returns the GGUF files of a model; several if it is split, the first one first.

    Args:
        place: A GGUF file, any part of a split one, or a folder.

    Returns:
        The files; none if the place is a folder without GGUF files, or with other weights.

    Raises:
        ConfigError: The folder holds several models.
        CheckpointError: A part of a model that is split is missing.
    """
    if place.name.endswith(SUFFIX) and not place.is_dir():
        return _parts(place)
    found = place.list()
    if any(file.name.endswith(OTHER_WEIGHTS) for file in found):
        return []
    models = list(dict.fromkeys(_first(file) for file in found if file.name.endswith(SUFFIX)))
    if len(models) > 1:
        names = ", ".join(model.name for model in models[:MAX_LISTED])
        raise ConfigError(f"{place} holds several GGUF files; name one of them as {place}/FILE: {names}")
    return _parts(models[0]) if models else []


def _first(file: Location) -> Location:
    """Returns the first part of a model that is split; the file itself if it is whole."""
    match = SPLIT.fullmatch(file.name)
    return _part(file, match, 1) if match else file


def _part(file: Location, match: re.Match[str], number: int) -> Location:
    folder = Location(file.url.removesuffix(file.name).rstrip("/") or "/", file.options)
    return folder / f"{match['stem']}-{number:05}-of-{match['count']}{SUFFIX}"


def _parts(file: Location) -> list[Location]:
    match = SPLIT.fullmatch(file.name)
    if match is None:
        return [file]
    parts = [_part(file, match, number) for number in range(1, int(match["count"]) + 1)]
    absent = [part.name for part in parts[:MAX_LISTED] if not part.exists()]
    if absent:
        raise CheckpointError(f"{file} is one of {match['count']} files; these are missing: {', '.join(absent)}")
    return parts

"""`read_sentence_transformer`: the pooling settings in a model's folder that has the files of sentence-transformers."""

from __future__ import annotations

import json
from typing import Any

from ..errors import CheckpointError
from ..storage import Location
from .config import PoolerConfig

__all__ = ["read_sentence_transformer"]

SENTENCE_MODES = {"lasttoken": "LAST", "mean": "MEAN", "mean_tokens": "MEAN"}
"""Names of pooling modes in sentence-transformers (`pooling_mode_*`) -> `PoolerConfig.pooling_type`."""


def read_sentence_transformer(place: Location) -> PoolerConfig:
    """Reads the pooling settings of a model from its `modules.json` and the config of the pooling module.

    Args:
        place: Folder of the model.

    Returns:
        The settings; all are None if there is no `modules.json`.

    Raises:
        CheckpointError: A file is damaged, or asks for a kind of pooling that this release does not have.
    """
    modules = _read_json(place, "modules.json")
    if modules is None:
        return PoolerConfig()
    kinds = {str(module.get("type", "")).rpartition(".")[2]: module.get("path", "") for module in modules}
    pooling = _read_json(place, f"{kinds['Pooling']}/config.json") if "Pooling" in kinds else None
    normalizes = "Normalize" in kinds
    if not pooling:
        return PoolerConfig(use_activation=normalizes)
    modes = [name.removeprefix("pooling_mode_") for name, on in pooling.items() if on is True and "_mode_" in name]
    if len(modes) != 1 or modes[0] not in SENTENCE_MODES:
        raise CheckpointError(
            f"{place} is to be pooled by {' and '.join(modes) or 'nothing'}; this release does lasttoken, mean_tokens"
        )
    return PoolerConfig(SENTENCE_MODES[modes[0]], normalizes)


def _read_json(place: Location, name: str) -> Any:
    file = place / name
    if not file.exists():
        return None
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}; the file is damaged") from error

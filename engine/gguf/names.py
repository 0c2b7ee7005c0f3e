"""`gguf_weight_map`: the names of a family's weights in GGUF files."""

from __future__ import annotations

from ..errors import ConfigError
from ..weights.checkpoint import WeightMap
from .rope import FACTORS, LONG, SHORT

__all__ = ["gguf_weight_map"]


def gguf_weight_map(architecture: str, weights: WeightMap) -> WeightMap:
    """Returns the map from names in GGUF files to our names.

    The package `gguf` knows the name of each module of a checkpoint in a GGUF file, so a family needs no second table.

    Args:
        architecture: The value of `general.architecture`.
        weights: The names of the family's weights in checkpoints.

    Raises:
        ConfigError: The package is not installed.
    """
    try:
        from gguf.constants import MODEL_ARCH_NAMES
        from gguf.tensor_mapping import get_tensor_name_map
    except ImportError as error:
        raise ConfigError("GGUF files are read with the package gguf: pip install 'millrace[gguf]'") from error
    kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(kind, 1)
    modules, layouts = {}, {}
    for theirs, ours in weights.modules.items():
        candidates = (names.get_name((prefix + theirs).replace("*", "0")) for prefix in ("", *weights.prefixes))
        found = next((name for name in candidates if name is not None), None)
        if found is not None:
            name = found.replace(".0.", ".*.")
            modules[name] = ours
            if theirs in weights.layouts:
                layouts[name] = weights.layouts[theirs]
    return WeightMap((), modules, (FACTORS, SHORT, LONG), layouts=layouts)

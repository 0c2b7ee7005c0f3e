"""Filling models that need not be one of a family, such as single layers, from checkpoints."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from torch import nn

from millrace.engine.storage import Location
from millrace.engine.weights.checkpoint import WeightMap, fill_slots, match_weights
from millrace.engine.weights.model_slots import weight_slots

__all__ = ["load_weights"]


def load_weights(
    model: nn.Module, folder: str | Path | Location, weights: WeightMap, elsewhere: Collection[str] = ()
) -> None:
    """Fills every parameter of a model from a checkpoint; the arguments are those of `match_weights`."""
    slots = weight_slots(model)
    fill_slots(slots, match_weights(slots, folder, weights, elsewhere))

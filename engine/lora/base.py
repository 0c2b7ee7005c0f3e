"""`AdapterBase`: what the reader of adapters knows about the model that the adapters change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..weights.checkpoint import WeightMap

__all__ = ["AdapterBase"]


@dataclass(frozen=True, slots=True, eq=False)
class AdapterBase:
    """What the reader of adapters knows about the model that the adapters change.

    Attributes:
        weights: Names in checkpoints of the model's family, as transformers writes them, -> our names.
        shapes: Our path of each fused part that an adapter can change -> rows and columns of its whole matrix.
        dtype: Number type of the model, to which an adapter's matrices are cast.
        max_rank: Largest rank of an adapter's matrices (`max_lora_rank`).
        tables: Our paths of the token embedding and the output head, if adapters can replace rows of them.
        is_tied: Whether the output head uses the table of the token embedding.
        read_own: Reads the model's own tensor of a token embedding or an output head from its checkpoint, by our name;
            returns None if it cannot be compared with that of an adapter's file.
        download_dir: Folder of the cache for adapters of a hub; None for that of the hub's library.
    """

    weights: WeightMap
    shapes: Mapping[str, tuple[int, int]]
    dtype: torch.dtype
    max_rank: int
    tables: frozenset[str] = frozenset()
    is_tied: bool = False
    read_own: Callable[[str], Tensor | None] = lambda _: None
    download_dir: str | None = None

"""What a quantization scheme declares: where it runs, which layers it takes, and the linear layer that it makes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..device import Device
from ..layers import LinearBase
from ..parallel.shard import Shard

__all__ = ["LinearSpec", "QuantizationScheme"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSpec:
    """What a model asks of one linear layer.

    Attributes:
        name: Path of the layer in the model, e.g. `layers.3.attention.qkv`.
        in_features: Columns of the matrix, of which this rank may hold a part.
        blocks: Row blocks of the matrix by name, in order, e.g. `query`, `key` and `value`. A layer that is not fused
            has one block, whose name is empty.
        bias: Whether there is a bias.
        dtype: Number type of the inputs, the outputs and the bias.
        device: Where the weights are.
    """

    name: str
    in_features: Shard
    blocks: Mapping[str, Shard]
    bias: bool
    dtype: torch.dtype
    device: torch.device

    @property
    def part_names(self) -> list[str]:
        """Paths of the row blocks, which are separate layers in a checkpoint: `layers.3.attention.qkv.query`, ..."""
        return [f"{self.name}.{block}".rstrip(".") for block in self.blocks]

    @property
    def num_columns(self) -> int:
        """Columns that this rank holds."""
        return self.in_features.length

    @property
    def num_rows(self) -> int:
        """Rows that this rank holds, those of all blocks together."""
        return sum(rows.length for rows in self.blocks.values())


class QuantizationScheme(ABC):
    """How the matrices of linear layers are stored and multiplied.

    The linear layer that a scheme makes calls the kernels of the scheme, says through `slots` which tensors of a
    checkpoint fill it, and finishes them in `pack` once they are loaded.

    Args:
        deterministic: Whether every row of a batch must be computed the same to the bit, whatever rows are beside it.

    Attributes:
        sizes: The sizes of matrices that the scheme takes, in words.

    Raises:
        ConfigError: The scheme excludes an option.
    """

    sizes: ClassVar[str] = "any sizes"

    def __init__(self, *, deterministic: bool = False) -> None:
        self.deterministic = deterministic

    @abstractmethod
    def check(self, device: Device, dtype: torch.dtype) -> None:
        """Checks that the scheme runs on a device, with activations of a dtype.

        Raises:
            ConfigError: The scheme does not.
        """

    def covers(self, layer: LinearSpec) -> bool:
        """Returns whether the scheme is for a layer of this name; other layers keep full precision.

        Output heads keep full precision, unless a scheme overrides this.
        """
        return layer.name not in ("lm_head", "score")

    @abstractmethod
    def takes(self, layer: LinearSpec) -> bool:
        """Returns whether the sizes of a layer will do; a layer of other sizes keeps full precision, with a warning."""

    @abstractmethod
    def make_linear(self, layer: LinearSpec) -> LinearBase:
        """Makes a layer. The memory of its parameters is not initialised."""

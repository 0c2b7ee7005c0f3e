"""`QuantizationScheme`: the interface of a scheme: its devices, the layers that it quantises, how it makes a layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..device import Device
from ..layers import Experts, ExpertsLayer, LinearBase
from ..parallel.shard import Shard
from ..weights.codes import QuantForm

__all__ = ["LinearSpec", "QuantizationScheme"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSpec:
    """The description of a linear layer that a scheme is to make.

    Attributes:
        name: Path of the layer in the model, e.g. `layers.3.attention.qkv`.
        in_features: Columns of the matrix; this rank may have a part of them.
        blocks: Rows of the fused parts of the matrix by name, in order, e.g. `query`, `key` and `value`; this rank may
            have a part of each. A layer that is not fused has one part, whose name is empty.
        bias: Whether the layer has a bias.
        dtype: Number type of the inputs, the outputs and the bias.
        device: Device of the weights.
    """

    name: str
    in_features: Shard
    blocks: Mapping[str, Shard]
    bias: bool
    dtype: torch.dtype
    device: torch.device

    @property
    def part_names(self) -> list[str]:
        """Paths of the fused parts, which are separate layers in a checkpoint: `layers.3.attention.qkv.query`, ..."""
        return [f"{self.name}.{block}".rstrip(".") for block in self.blocks]

    @property
    def num_columns(self) -> int:
        """Number of columns of the matrix that this rank has."""
        return self.in_features.length

    @property
    def num_rows(self) -> int:
        """Number of rows that this rank has of all fused parts together."""
        return sum(rows.length for rows in self.blocks.values())


class QuantizationScheme(ABC):
    """A way to store and multiply the matrices of linear layers.

    A scheme makes linear layers. Each layer calls the kernels of the scheme, declares through `slots` which tensors
    of a checkpoint fill its weight slots, and changes the layout of the weights in `pack` after they are loaded.

    Args:
        deterministic: Whether each row of a batch must get the same bits whatever the other rows are.

    Attributes:
        sizes: The sizes of matrices that the scheme supports, in words for a message.

    Raises:
        ConfigError: The scheme cannot be combined with an option.
    """

    sizes: ClassVar[str] = "any sizes"

    def __init__(self, *, deterministic: bool = False) -> None:
        self.deterministic = deterministic

    @abstractmethod
    def check(self, device: Device, dtype: torch.dtype) -> None:
        """Checks that the scheme can run on a device with activations of a dtype.

        Raises:
            ConfigError: The scheme cannot run on the device, or not with the dtype.
        """

    def applies_to(self, layer: LinearSpec) -> bool:
        """Returns whether the scheme quantises a layer, judged by its name; other layers stay in full precision.

        Output heads stay in full precision, unless a scheme overrides this method.
        """
        return layer.name not in ("lm_head", "score")

    @abstractmethod
    def supports_sizes(self, layer: LinearSpec) -> bool:
        """Returns whether the sizes of a layer are supported; other layers stay in full precision, with a warning."""

    @abstractmethod
    def make_linear(self, layer: LinearSpec) -> LinearBase:
        """Makes a linear layer. The memory of its parameters is not initialised."""

    def make_experts(self, layer: ExpertsLayer) -> Experts | None:
        """Makes the experts of a layer. The memory of their parameters is not initialised.

        Returns:
            The experts; None if the scheme does not support their sizes: they stay in full precision, with a warning.
        """
        del layer
        return None

    def table_form(self, layer: LinearSpec) -> QuantForm | None:
        """Returns how the table of token embeddings is quantised; None for a table in full precision.

        Args:
            layer: The table as a matrix: a row for each token. A tied output head multiplies by it.
        """
        del layer
        return None

    def notes(self) -> Iterator[str]:
        """Yields what users should know about the layers that were made, as sentences."""
        return iter(())

    @classmethod
    def declines(cls, form: QuantForm, layer: LinearSpec, device: Device, *, deterministic: bool) -> str | None:
        """Returns why the scheme cannot multiply by a matrix as a checkpoint stores it; None if it can.

        Args:
            form: How the matrix is quantised.
            layer: The layer of the matrix.
            device: Device of the model.
            deterministic: Whether each row of a batch must get the same bits whatever the other rows are.

        Returns:
            The end of a sentence that begins with "the layer is dequantised", such as ": groups of 128 columns do not
            divide the 96 of a rank"; empty if the scheme is for other forms.
        """
        del form, layer, device, deterministic
        return ""

    @classmethod
    def make_stored(cls, layer: LinearSpec, form: QuantForm) -> LinearBase:
        """Makes a layer for a matrix that `declines` returns None for. Its memory is not initialised."""
        raise NotImplementedError(f"{cls.__name__} declines all forms of checkpoints; {form} reached it")

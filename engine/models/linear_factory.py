"""`LinearFactory`: makes every linear layer of a model, by the quantization scheme or in full precision."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch

from ..layers import Experts, ExpertsLayer, Linear, LinearBase
from ..lora.layer import LoraLinear
from ..lora.new_rows import ReplacedRows
from ..lora.slots import HEADS, DeviceSlots
from ..parallel.shard import Dimension, as_shard
from ..quantization.full_precision import FullPrecision
from ..quantization.group_embedding import TiedGroupHead
from ..quantization.group_linear import GroupLinear
from ..quantization.scheme import LinearSpec
from .options import ModelOptions

__all__ = ["LinearFactory"]

logger = logging.getLogger(__name__)


class LinearFactory:
    """Makes the linear layers of one model.

    Args:
        options: The user's options for the model, which include the quantization scheme.
        dtype: Number type of the inputs and outputs of all layers.
        device: Device of the weights.

    Attributes:
        adapters: The adapter slots of the layers; None for a model without adapters.
    """

    def __init__(self, options: ModelOptions, dtype: torch.dtype, device: torch.device) -> None:
        self._name = options.quantization
        self._scheme = options.make_scheme()
        self._full_precision = FullPrecision(deterministic=options.deterministic)
        self._dtype = dtype
        self._device = device
        self.adapters = None if options.adapter_slots is None else DeviceSlots(options.adapter_slots)
        self._declined: dict[str, list[str]] = {}  # What the scheme takes -> layers that it therefore does not.

    def make_linear(
        self, name: str, in_features: Dimension, out_features: Dimension | Mapping[str, Dimension], *, bias: bool
    ) -> LinearBase:
        """Makes a layer of the quantization scheme, or in full precision if the scheme excludes its name or its sizes.

        Args:
            name: Path of the layer in the model, e.g. `layers.3.attention.qkv`.
            in_features: Columns of the matrix.
            out_features: Rows of the matrix, or the sizes of its named fused parts in order.
            bias: Whether the layer has a bias.
        """
        layer = self._spec(name, in_features, out_features, bias, self._device)
        return self._with_adapters(self._make_base(layer), layer)

    def _make_base(self, layer: LinearSpec) -> LinearBase:
        """Makes a layer without adapters."""
        if not self._scheme.applies_to(layer):
            return self._full_precision.make_linear(layer)
        if not self._scheme.supports_sizes(layer):
            self._decline(layer.name, self._scheme.sizes)
            return self._full_precision.make_linear(layer)
        return self._scheme.make_linear(layer)

    def _with_adapters(self, base: LinearBase, layer: LinearSpec) -> LinearBase:
        if self.adapters is None:
            return base
        if layer.name in HEADS and not layer.bias:  # PEFT's results with new rows and the bias would be others.
            (rows,) = layer.blocks.values()
            base = ReplacedRows(base, layer.name, rows, self.adapters, self._device)
        return LoraLinear(base, layer, self.adapters, self._device)

    def make_table(self, name: str, size: int, rows: Dimension) -> GroupLinear | None:
        """Makes the table of token embeddings as a matrix; None if it is to be in full precision.

        Args:
            name: Path of the token embedding in the model.
            size: Length of an embedding.
            rows: The tokens.
        """
        layer = self._spec(name, size, rows, False, self._device)
        form = self._scheme.table_form(layer)
        if form is not None and not self._scheme.supports_sizes(layer):
            self._decline(name, self._scheme.sizes)
            return None
        return None if form is None else GroupLinear(layer, form)

    def make_small(
        self, name: str, in_features: int, out_features: int, *, bias: bool = False, dtype: torch.dtype | None = None
    ) -> Linear:
        """Makes a layer of few rows, such as a router, which every rank has whole and no scheme quantises.

        Args:
            name: Path of the layer in the model.
            in_features: Columns of the matrix.
            out_features: Rows of the matrix.
            bias: Whether the layer has a bias.
            dtype: Number type of inputs, matrix and outputs; None for that of the model.
        """
        layer = self._spec(name, in_features, out_features, bias, self._device)
        return self._full_precision.make_linear(replace(layer, dtype=dtype or self._dtype))

    def make_experts(self, layer: ExpertsLayer) -> Experts:
        """Makes the experts of a layer, as the quantization scheme stores them or in full precision.

        Args:
            layer: The description of the experts.
        """
        made = self._scheme.make_experts(layer)
        if made is None:
            self._decline(layer.name, self._scheme.sizes)
            made = self._full_precision.make_experts(layer)
        return made

    def _decline(self, name: str, taken: str) -> None:
        self._declined.setdefault(taken, []).append(name)

    def make_tied(self, name: str, in_features: int, out_features: Dimension, weight: torch.nn.Parameter) -> LinearBase:
        """Makes a linear layer in full precision and without a bias that uses the matrix of another layer.

        Args:
            name: Path of the layer in the model.
            in_features: Columns of the matrix.
            out_features: Rows of the matrix.
            weight: Matrix of the other layer.
        """
        # On the meta device the layer allocates no matrix of its own.
        layer = self._spec(name, in_features, out_features, False, torch.device("meta"))
        linear = self._full_precision.make_linear(layer)
        linear.weight = weight
        return self._with_adapters(linear, layer)

    def make_tied_group(self, name: str, in_features: int, out_features: Dimension, table: GroupLinear) -> LinearBase:
        """Makes a linear layer that uses the table of token embeddings, which is integers in groups (`make_table`).

        Args:
            name: Path of the layer in the model.
            in_features: Columns of the matrix.
            out_features: Rows of the matrix.
            table: The table.
        """
        return self._with_adapters(
            TiedGroupHead(table), self._spec(name, in_features, out_features, False, self._device)
        )

    def warn_of_declined(self) -> None:
        """Logs a warning if layers stay in full precision, or are dequantised, because no scheme takes them."""
        if self._device.type == "meta":
            return  # The same model is made again on its device.
        for note in self._scheme.notes():
            logger.warning("%s", note)
        for taken, names in self._declined.items():
            logger.warning(
                "%s and %d more stay in full precision: quantization=%r takes %s",
                names[0],
                len(names) - 1,
                self._name,
                taken,
            )

    def _spec(
        self,
        name: str,
        in_features: Dimension,
        out_features: Dimension | Mapping[str, Dimension],
        bias: bool,
        device: torch.device,
    ) -> LinearSpec:
        blocks = out_features if isinstance(out_features, Mapping) else {"": out_features}
        return LinearSpec(
            name=name,
            in_features=as_shard(in_features),
            blocks={block: as_shard(rows) for block, rows in blocks.items()},
            bias=bias,
            dtype=self._dtype,
            device=device,
        )

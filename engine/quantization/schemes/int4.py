"""`Int4Scheme` (`quantization="int4"`): weights in 4-bit integers with plain activations; a quarter of bfloat16.

The rows of weights are rounded while they are loaded, so a model never needs the memory of full precision. The output
head and the token embedding, a third of a small model, get 8 bits: an error of the head is one of the logits.
"""

from __future__ import annotations

import torch

from ...device import Device
from ...errors import ConfigError
from ...layers import Experts, ExpertsLayer, LinearBase
from ...weights.codes import QuantForm
from ..coded_experts import CodedExperts
from ..group_linear import GroupLinear
from ..scheme import LinearSpec, QuantizationScheme

__all__ = ["SCHEME", "Int4Scheme"]


BITS, TABLE_BITS = 4, 8

GROUP_SIZES = (64, 32)
"""Columns that share a scale: the first that divides those of the layer. With 128 columns the error is 9 % larger."""


class Int4Scheme(QuantizationScheme):
    """Stores weights as integers of 4 bits in groups of columns, and as those of 4 or 8 bits that a checkpoint has."""

    sizes = f"inputs in multiples of {GROUP_SIZES[-1]}"

    def check(self, device: Device, dtype: torch.dtype) -> None:
        """Accepts every device, unless the engine is deterministic, and every dtype.

        Raises:
            ConfigError: The device is a GPU, and the engine is deterministic.
        """
        if self.deterministic and not device.is_cpu:
            raise ConfigError(
                "quantization='int4' and deterministic=True exclude each other on a GPU: the order of the sums depends "
                "on the batch; drop one of the two"
            )

    def applies_to(self, layer: LinearSpec) -> bool:
        """Returns True for all layers but the head of a classifier, which is small."""
        return layer.name != "score"

    def supports_sizes(self, layer: LinearSpec) -> bool:
        """Returns whether a group size divides the columns of the matrix."""
        return layer.num_columns % GROUP_SIZES[-1] == 0

    def make_linear(self, layer: LinearSpec) -> LinearBase:
        """Makes a linear layer whose matrix is quantised while it is loaded."""
        bits = TABLE_BITS if layer.name == "lm_head" else BITS
        return GroupLinear(layer, _form(layer.num_columns, layer.dtype, bits))

    def table_form(self, layer: LinearSpec) -> QuantForm:
        """Returns the form of the table of token embeddings, which has 8 bits."""
        return _form(layer.num_columns, layer.dtype, TABLE_BITS)

    def make_experts(self, layer: ExpertsLayer) -> Experts | None:
        """Makes experts whose matrices are quantised while they are loaded."""
        sizes = (layer.hidden_size, layer.inner.length)
        if any(size % GROUP_SIZES[-1] for size in sizes):
            return None
        forms = [_form(size, torch.float32, BITS) for size in sizes]
        return CodedExperts(layer, *forms, deterministic=self.deterministic)

    @classmethod
    def declines(cls, form: QuantForm, layer: LinearSpec, device: Device, *, deterministic: bool) -> str | None:
        """Takes integers of 4 or 8 bits in whole groups of columns."""
        return GroupLinear.declines(form, layer, device, deterministic=deterministic)

    @classmethod
    def make_stored(cls, layer: LinearSpec, form: QuantForm) -> LinearBase:
        """Makes a `GroupLinear`."""
        return GroupLinear(layer, form)


def _form(num_columns: int, scale_dtype: torch.dtype, bits: int) -> QuantForm:
    size = next(size for size in GROUP_SIZES if num_columns % size == 0 or size == GROUP_SIZES[-1])
    return QuantForm("int4", "int", bits, size, scale_dtype=scale_dtype)


SCHEME = Int4Scheme

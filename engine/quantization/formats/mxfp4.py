"""`Mxfp4Format` (`quant_method: mxfp4`) of gpt-oss (OCP Microscaling Formats Specification 1.0, 2023, section 5).

All experts of a layer are one tensor of 4-bit floats (e2m1) in blocks of 32 neighbouring columns, two in a byte, the
first one in its lower half. The scale of a block is a power of two, of which the exponent plus 127 is stored:

    X_blocks [num_experts, N, K / 32, 16] uint8,   X_scales [num_experts, N, K / 32] uint8
    W[e, n, k] = e2m1(blocks[e, n, k / 32, ...]) * 2 ** (scales[e, n, k / 32] - 127)

The matrices are not transposed, unlike those of the unquantised model, which has `X` instead of `X.weight`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...weights.codes import Codes, QuantForm
from ...weights.quantised_matrix import numbers_of
from ...weights.tensor_view import StoredTensor
from ..checkpoint_format import CheckpointFormat
from ..fp4_matrix import e2m1_numbers, e2m1_table
from ..fp8_matrix import scale_numbers
from ..settings import check_fields, module_names
from ..tensor_checks import check_there

__all__ = ["FORMAT", "Mxfp4Format", "Mxfp4Tensor"]

BLOCK = 32
FORM = QuantForm("mxfp4", "mxfp4", 4, BLOCK)


@dataclass(frozen=True, slots=True, eq=False)
class Mxfp4Tensor:
    """The matrices of some experts, whose numbers are dequantised by `read` and left as they are by `codes`.

    Attributes:
        blocks: `[..., num_blocks, 16]` uint8.
        scales: `[..., num_blocks]` uint8.
        columns: The numbers of each row that this part has.
    """

    blocks: StoredTensor
    scales: StoredTensor
    columns: range

    @property
    def form(self) -> QuantForm:
        """How the numbers are quantised."""
        return FORM

    @property
    def dtype(self) -> torch.dtype:
        """Number type of the dequantised numbers, in which they are exact."""
        return torch.bfloat16

    @property
    def shape(self) -> torch.Size:
        """Shape of the dequantised tensor."""
        return torch.Size((*self.scales.shape[:-1], len(self.columns)))

    def narrow(self, dim: int, start: int, length: int) -> Mxfp4Tensor:
        """Returns the given range of dimension `dim`, like `torch.Tensor.narrow`; no numbers are read."""
        if dim == len(self.shape) - 1:
            return replace(self, columns=self.columns[start : start + length])
        blocks, scales = (each.narrow(dim, start, length) for each in (self.blocks, self.scales))
        return replace(self, blocks=blocks, scales=scales)

    def read(self) -> Tensor:
        """Reads whole rows, and returns this part of them in bfloat16."""
        blocks, scales = e2m1_numbers(numbers_of(self.blocks)), scale_numbers(self.scales)
        rows = (blocks * scales.unsqueeze(-1)).to(self.dtype).flatten(-2)
        return rows[..., self.columns.start : self.columns.stop]

    def codes(self) -> Codes:
        """Reads whole rows, and returns this part of them, which must begin and end with a block."""
        blocks, scales = numbers_of(self.blocks), scale_numbers(self.scales)
        values = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-3)
        first, last = self.columns.start // BLOCK, -(-self.columns.stop // BLOCK)
        return Mxfp4Codes(values[..., self.columns.start : self.columns.stop], scales[..., first:last])


@dataclass(frozen=True, slots=True, eq=False)
class Mxfp4Codes(Codes):
    """Codes whose values are the bits of e2m1, uint8."""

    def dequantise(self) -> Tensor:
        """Returns the numbers of the matrix, `[rows, columns]` float32."""
        return Codes(e2m1_table()[self.values.int()], self.scales).dequantise()


class Mxfp4Format(CheckpointFormat):
    """The format of the experts of gpt-oss. All other matrices are plain."""

    leaves = ("blocks", "scales")

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        check_fields(config, ("modules_to_not_convert", "dequantize"))  # Neither changes a number.
        module_names(config, "modules_to_not_convert")

    @property
    def planned_form(self) -> QuantForm:
        """The form of the experts."""
        return FORM

    def plans(self, name: str) -> bool:
        """Returns whether a layer is an expert: all others are plain."""
        return ".experts." in name

    def split(self, name: str) -> tuple[str, str]:
        """Returns the stem and the ending of a name, which an underline separates."""
        stem, _, leaf = name.rpartition("_")
        return (stem, leaf) if leaf in self.leaves else (name, "")

    def join_module(self, module: str, tensors: Mapping[str, StoredTensor]) -> Iterable[tuple[str, StoredTensor]]:
        """Yields one tensor for the blocks and the scales of the same matrices."""
        check_there(module, tensors, dict.fromkeys(self.leaves, torch.uint8))
        blocks, scales = (tensors[leaf] for leaf in self.leaves)
        if [*blocks.shape] != [*scales.shape, BLOCK // 2] or not scales.shape:
            raise CheckpointError(
                f"{module}_blocks has shape {[*blocks.shape]} and {module}_scales has shape {[*scales.shape]}; the "
                f"blocks must have one dimension more, of {BLOCK // 2} bytes; fetch the checkpoint again"
            )
        yield "weight", Mxfp4Tensor(blocks, scales, range(scales.shape[-1] * BLOCK))


FORMAT = Mxfp4Format

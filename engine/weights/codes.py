"""`Codes`: numbers of a quantised matrix as they are stored; `QuantForm`: the way in which they are stored.

Checkpoints pack the same few kinds of matrices in many ways. Each format is read into this one form, which all layers
take:

    W[n, k] = (values[n, k] - zeros[n, g]) * scales[n, g]        g = groups[k], the group of column k
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

__all__ = ["Codes", "InputQuant", "QuantForm"]

Kind: TypeAlias = Literal["int", "fp8", "mxfp4", "table"]


@dataclass(frozen=True, slots=True)
class InputQuant:
    """How a checkpoint asks a layer to quantise its input.

    Attributes:
        kind: `"int"` for 8-bit integers, `"fp8"` for e4m3.
        group_size: Columns of a token that share a scale; 0 for all columns.
        scale: The scale of all tokens, if the checkpoint has one; None to choose one for each token.
        zero: The integer that stands for 0, with a fixed scale.
    """

    kind: Literal["int", "fp8"]
    group_size: int = 0
    scale: float | None = None
    zero: int = 0


@dataclass(frozen=True, slots=True)
class QuantForm:
    """How the numbers of a matrix are quantised; equal for two matrices that one kernel can multiply by together.

    Attributes:
        format: Name of the checkpoint's format, for messages.
        kind: `"int"` for integers, `"fp8"` for e4m3, `"mxfp4"` for e2m1 with powers of two as scales, `"table"` for
            numbers that can only be dequantised.
        bits: Bits of a number.
        group_size: Neighbouring columns that share a scale; 0 for all columns.
        has_zeros: Whether the groups have zero points.
        act_order: Whether the columns of a group may be anywhere in the row (GPTQ's `desc_act`).
        row_block: Neighbouring rows that share a scale.
        inputs: How the input of the layer is quantised; None if it is not.
        scale_dtype: Number type in which the scales are stored.
    """

    format: str
    kind: Kind
    bits: int
    group_size: int = 0
    has_zeros: bool = False
    act_order: bool = False
    row_block: int = 1
    inputs: InputQuant | None = None
    scale_dtype: torch.dtype = torch.float32


@dataclass(frozen=True, slots=True, eq=False)
class Codes:
    """A part of a quantised matrix, with its numbers read.

    Attributes:
        values: `[rows, columns]`: int8 for integers without zero points, uint8 for those with them, e4m3, or float32.
        scales: `[rows, num_groups]` float32.
        zeros: `[rows, num_groups]` uint8; None for 0.
        groups: `[columns]` int64, the group of each column; None if groups are neighbouring columns of equal number.
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    groups: Tensor | None = None

    def dequantise(self) -> Tensor:
        """Returns the numbers of the matrix, `[rows, columns]` float32."""
        numbers = self.values.float()
        if self.groups is None and self.scales.shape[1] > 0:
            shape = (*self.scales.shape, numbers.shape[1] // self.scales.shape[1])
            numbers = numbers.view(shape)
            if self.zeros is not None:
                numbers = numbers - self.zeros.unsqueeze(-1)
            return (numbers * self.scales.unsqueeze(-1)).flatten(1)
        if self.groups is None:
            return numbers
        if self.zeros is not None:
            numbers = numbers - self.zeros[:, self.groups]
        return numbers * self.scales[:, self.groups]

    def rows(self, index: Tensor) -> Codes:
        """Returns the rows of the given numbers, `[num_rows]` int64."""
        zeros = None if self.zeros is None else self.zeros[index]
        return replace(self, values=self.values[index], scales=self.scales[index], zeros=zeros)

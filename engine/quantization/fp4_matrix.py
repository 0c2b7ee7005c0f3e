"""`Fp4Matrix`: a matrix of 4-bit floats (e2m1) in blocks of neighbouring columns, each of which has a scale (NVFP4).

    W[n, k] = e2m1(code[n, k]) * scale[n, k // 16] * whole_scale

A byte has the numbers of two columns, the first one in its lower half. The scales of blocks are e4m3. No layer computes
with such numbers: they are dequantised.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..weights.codes import Codes, QuantForm
from ..weights.quantised_matrix import QuantisedMatrix, numbers_of
from ..weights.tensor_layout import misshapen
from ..weights.tensor_view import StoredTensor
from .fp8_matrix import scale_numbers

__all__ = ["BLOCK", "Fp4Matrix", "e2m1_numbers", "e2m1_table"]

BLOCK = 16
"""Columns of a block of NVFP4."""

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The numbers of the format without their sign, which is the highest of the four bits."""


@dataclass(frozen=True, slots=True, eq=False)
class Fp4Matrix(QuantisedMatrix):
    """A matrix in NVFP4, stored as `weight` and `scale`.

    Attributes:
        whole_scale: The factor of the whole matrix.
    """

    whole_scale: float

    @classmethod
    def join(
        cls,
        module: str,
        weight: tuple[str, StoredTensor],
        scale: tuple[str, StoredTensor],
        *,
        format_name: str,
        whole_scale: float,
    ) -> Fp4Matrix:
        """Returns the matrix of a module, after a check of its shapes and number types.

        Args:
            module: The checkpoint's name of the module.
            weight: The name of the codes in the module, and the codes `[N, K / 2]` uint8.
            scale: The name of the scales of blocks, and the scales `[N, K / 16]` e4m3.
            format_name: Name of the checkpoint's format.
            whole_scale: The factor of the whole matrix.

        Raises:
            CheckpointError: A tensor has a wrong shape or number type.
        """
        (leaf, codes), (scale_leaf, scales) = weight, scale
        if codes.dtype != torch.uint8 or len(codes.shape) != 2 or codes.shape[1] * 2 % BLOCK:
            raise CheckpointError(
                f"{module}.{leaf} is of {codes.dtype} and has shape {list(codes.shape)}; in NVFP4 it must be a matrix "
                f"of torch.uint8 whose rows have a multiple of {BLOCK // 2} bytes; fetch the checkpoint again"
            )
        num_rows, num_columns = codes.shape[0], codes.shape[1] * 2
        if scales.dtype != torch.float8_e4m3fn:
            raise CheckpointError(f"{module}.{scale_leaf} is of {scales.dtype}; in NVFP4 it is of torch.float8_e4m3fn")
        if list(scales.shape) != [num_rows, num_columns // BLOCK]:
            raise misshapen(f"{module}.{scale_leaf}", scales.shape, [num_rows, num_columns // BLOCK])
        form = QuantForm(format_name, "table", 4, BLOCK)
        return cls(module, form, {"weight": codes, "scale": scales}, range(num_rows), range(num_columns), whole_scale)

    def codes(self) -> Codes:
        """Reads the numbers of this part: of weight, whole bytes."""
        first, end = self.columns.start // 2, -(-self.columns.stop // 2)
        part = self.tensors["weight"].narrow(0, self.rows.start, len(self.rows)).narrow(1, first, end - first)
        start = self.columns.start - 2 * first
        values = e2m1_numbers(numbers_of(part))[:, start : start + len(self.columns)]
        groups = self.group_range
        scales = self.tensors["scale"].narrow(0, self.rows.start, len(self.rows)).narrow(1, groups.start, len(groups))
        return Codes(values, scale_numbers(scales) * self.whole_scale, groups=self.column_groups)


def e2m1_table() -> Tensor:
    """Returns the number of each code, `[16]` float32."""
    return torch.tensor((*MAGNITUDES, *(-magnitude for magnitude in MAGNITUDES)))


def e2m1_numbers(codes: Tensor) -> Tensor:
    """Returns the numbers of bytes that hold two each.

    Args:
        codes: `[..., num_bytes]` uint8.

    Returns:
        `[..., 2 * num_bytes]` float32.
    """
    numbers = e2m1_table()
    byte = torch.arange(256)
    pairs = torch.stack((numbers[byte & 15], numbers[byte >> 4]), dim=-1)
    return pairs[codes.int()].flatten(-2)

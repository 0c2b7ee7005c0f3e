"""`Fp8Matrix`: a matrix of 8-bit floats (e4m3) whose scales belong to the matrix, to rows, or to blocks of both.

    W[n, k] = weight[n, k] * scale[n // b, k // c]        for blocks of b rows and c columns

The last block of a row or of a column may have fewer numbers. One scale for a row is a block of 1 row and all columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..weights.codes import Codes, InputQuant, QuantForm
from ..weights.quantised_matrix import QuantisedMatrix, numbers_of
from ..weights.tensor_view import StoredTensor
from .tensor_checks import check_shape

__all__ = ["Fp8Matrix", "read_scale", "scale_numbers"]

EXPONENT_BIAS = 127
"""What the bytes of scales in e8m0, which are exponents of two, have in excess."""


@dataclass(frozen=True, slots=True, eq=False)
class Fp8Matrix(QuantisedMatrix):
    """A matrix of 8-bit floats, stored as `weight` and `scale`."""

    @classmethod
    def join(
        cls,
        module: str,
        weight: StoredTensor,
        scale: tuple[str, StoredTensor],
        *,
        format_name: str,
        setting: str,
        block: tuple[int, int] | None,
        inputs: InputQuant | None,
    ) -> Fp8Matrix:
        """Returns the matrix of a module, after a check of its shapes and number types.

        Args:
            module: The checkpoint's name of the module.
            weight: `[N, K]` e4m3.
            scale: The name of the scales in the module, and the scales: one, `[N]`, `[N, 1]`, or with blocks
                `[ceil(N / b), ceil(K / c)]`, also with dimensions of length 1.
            format_name: Name of the checkpoint's format.
            setting: The field of the config, with its value, that says which numbers share a scale; for messages.
            block: Rows and columns of a block; None if the scales are of the matrix or of rows.
            inputs: How the input of the layer is quantised.

        Raises:
            CheckpointError: A tensor has a wrong shape or number type.
        """
        leaf, scales = scale
        if weight.dtype != torch.float8_e4m3fn or len(weight.shape) != 2:
            raise CheckpointError(
                f"{module}.weight is of {weight.dtype} and has shape {list(weight.shape)}; with {leaf} beside it, it "
                "must be a matrix of torch.float8_e4m3fn; fetch the checkpoint again"
            )
        num_rows, num_columns = weight.shape
        asked = [num_rows] if block is None else [-(-num_rows // block[0]), -(-num_columns // block[1])]
        found = list(scales.shape)
        fits = found == asked if block else [n for n in found if n > 1] in ([], [n for n in asked if n > 1])
        if block and len(found) == 4:
            fits = found == [asked[0], 1, asked[1], 1]
        if not fits:
            check_shape(module, leaf, scales, asked if block else [num_rows, 1], setting)
        row_block, group_size = block or (1, 0)
        form = QuantForm(format_name, "fp8", 8, group_size, row_block=row_block, inputs=inputs)
        return cls(module, form, {"weight": weight, "scale": scales}, range(num_rows), range(num_columns))

    def codes(self) -> Codes:
        """Reads the numbers of this part, and a scale for each row and group of columns."""
        part = self.tensors["weight"].narrow(0, self.rows.start, len(self.rows))
        values = numbers_of(part.narrow(1, self.columns.start, len(self.columns)))
        return Codes(values, self._scales(), groups=self.column_groups)

    def _scales(self) -> Tensor:
        """Returns `[rows, num_groups]` float32."""
        scales = self.tensors["scale"]
        if scales.shape.numel() == 1:
            return scale_numbers(scales).reshape(1, 1).expand(len(self.rows), 1)
        block, groups = self.form.row_block, self.group_range
        first, end = self.rows.start // block, -(-self.rows.stop // block)
        part = scales.narrow(0, first, end - first)
        if self.form.group_size:
            part = part.narrow(len(scales.shape) // 2, groups.start, len(groups))
        blocks = torch.arange(self.rows.start, self.rows.stop) // block - first
        return scale_numbers(part).reshape(end - first, -1)[blocks]


def scale_numbers(scales: StoredTensor) -> Tensor:
    """Returns scales in float32. Bytes and e8m0 are exponents of two."""
    numbers = numbers_of(scales)
    if numbers.dtype == torch.uint8:
        return torch.ldexp(torch.ones(numbers.shape), numbers.int() - EXPONENT_BIAS)
    return numbers.float()


def read_scale(module: str, leaf: str, tensors: Mapping[str, StoredTensor]) -> float:
    """Returns a scale that a module has for all inputs of its layer.

    Raises:
        CheckpointError: The scale is missing, or not a positive number.
    """
    if leaf not in tensors:
        raise CheckpointError(f"{module} has no {leaf}, which a static quantisation of inputs needs; fetch all files")
    numbers = scale_numbers(tensors[leaf])
    if numbers.numel() != 1 or not 0 < float(numbers) < float("inf"):
        shown = f"of shape {list(numbers.shape)}" if numbers.numel() != 1 else str(float(numbers))
        raise CheckpointError(f"{module}.{leaf} is {shown}; it must be one positive number")
    return float(numbers)

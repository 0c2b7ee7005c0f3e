"""Matrices in 8-bit and 4-bit floats, written from the published layouts of fp8, fbgemm_fp8 and ModelOpt.

Each writer returns the tensors of a module, and the numbers that they stand for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gptq_files import Packed

__all__ = ["Write", "fp8_blocks", "fp8_rows", "fp8_tensor", "nvfp4", "to_e2m1"]

E4M3_MAX, E2M1_MAX = 448.0, 6.0
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])

Write = Callable[[Tensor], Packed]
"""Quantises a matrix."""


def fp8_tensor(inputs: float | None = None, scale: str = "weight_scale", input_scale: str = "input_scale") -> Write:
    """Returns the writer of one scale for a matrix, and one for the input unless it is None."""

    def write(matrix: Tensor) -> Packed:
        scales = (matrix.abs().max() / E4M3_MAX).reshape(())
        values = (matrix / scales).to(torch.float8_e4m3fn)
        more = {} if inputs is None else {input_scale: torch.tensor(inputs)}
        return Packed({"weight": values, scale: scales, **more}, values.float() * scales)

    return write


def fp8_rows(shape: tuple[int, ...] = (-1, 1)) -> Write:
    """Returns the writer of one scale for each row, in the given shape."""

    def write(matrix: Tensor) -> Packed:
        scales = matrix.abs().amax(1, keepdim=True) / E4M3_MAX
        values = (matrix / scales).to(torch.float8_e4m3fn)
        return Packed({"weight": values, "weight_scale": scales.view(shape)}, values.float() * scales)

    return write


def fp8_blocks(
    rows: int, columns: int, name: str = "weight_scale_inv", dtype: torch.dtype = torch.float32, dims: int = 2
) -> Write:
    """Returns the writer of one scale for each block, of any number type; scales of 8 bits are powers of two."""

    def write(matrix: Tensor) -> Packed:
        num_rows, num_columns = matrix.shape
        grid = torch.empty(-(-num_rows // rows), -(-num_columns // columns))
        spread = torch.empty_like(matrix)
        for row in range(grid.shape[0]):
            for column in range(grid.shape[1]):
                block = (slice(row * rows, (row + 1) * rows), slice(column * columns, (column + 1) * columns))
                largest = matrix[block].abs().max() / E4M3_MAX
                grid[row, column] = largest.log2().ceil().exp2() if dtype.itemsize == 1 else largest
                spread[block] = grid[row, column]
        values = (matrix / spread).to(torch.float8_e4m3fn)
        scales = grid.log2().add(127).to(dtype) if dtype == torch.uint8 else grid.to(dtype)
        if dims == 4:
            scales = scales[:, None, :, None]
        return Packed({"weight": values, name: scales}, values.float() * spread)

    return write


def nvfp4(inputs: float | None = None) -> Write:
    """Returns the writer of e2m1 in blocks of 16 columns, with scales in e4m3 and a factor of the matrix."""

    def write(matrix: Tensor) -> Packed:
        blocks = matrix.unflatten(1, (-1, 16))
        factor = matrix.abs().max() / E4M3_MAX / E2M1_MAX
        scales = (blocks.abs().amax(-1) / E2M1_MAX / factor).to(torch.float8_e4m3fn)
        spread = (scales.float() * factor).unsqueeze(-1)
        codes, numbers = to_e2m1(blocks / spread)
        packed = codes.flatten(1)[:, ::2] | codes.flatten(1)[:, 1::2] << 4
        more = {} if inputs is None else {"input_scale": torch.tensor(inputs)}
        tensors = {"weight": packed, "weight_scale": scales, "weight_scale_2": factor.reshape(()), **more}
        return Packed(tensors, (numbers * spread).flatten(1))

    return write


def to_e2m1(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the codes, uint8, of the nearest numbers of 4 bits, and these numbers."""
    places = (numbers.abs().unsqueeze(-1) - E2M1).abs().argmin(-1)
    codes = places + 8 * (numbers < 0)
    return codes.to(torch.uint8), torch.where(numbers < 0, -E2M1[places], E2M1[places])

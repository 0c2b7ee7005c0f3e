"""`join_mxfp4`: reads matrices in MXFP4 as bfloat16 (OCP Microscaling Formats Specification 1.0, 2023, section 5).

A checkpoint has two tensors of bytes for such a matrix. `X_blocks` has two numbers of 4 bits in each byte, the first
one in the lower half, in blocks of 32 numbers of a row. `X_scales` has the exponent of each block plus 127.
A number is a sign, two bits of exponent and one of mantissa. All products with a power of two are exact in bfloat16.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..layers import WeightSlot
from .codes import Codes, QuantForm
from .tensor_view import StoredTensor

__all__ = [
    "BLOCKS",
    "MXFP4_FORM",
    "SCALES",
    "Mxfp4Codes",
    "Mxfp4Tensor",
    "dequantise_mxfp4",
    "join_mxfp4",
    "warn_of_mxfp4",
]

logger = logging.getLogger(__name__)

BLOCKS, SCALES = "_blocks", "_scales"
"""Endings of the names of the two tensors."""

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BIAS = 127
_BLOCK = 32

MXFP4_FORM = QuantForm("mxfp4", "mxfp4", 4, _BLOCK)


@dataclass(frozen=True, slots=True, eq=False)
class Mxfp4Tensor:
    """A tensor in MXFP4, whose numbers are dequantised by `read` and left as they are by `codes`.

    Attributes:
        blocks: `[..., num_blocks, 16]` uint8.
        scales: `[..., num_blocks]` uint8.
        columns: The numbers of each row that this part has.
    """

    blocks: StoredTensor
    scales: StoredTensor
    columns: range

    @property
    def dtype(self) -> torch.dtype:
        """Number type of the dequantised numbers."""
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

    @property
    def form(self) -> QuantForm:
        """How the numbers are quantised."""
        return MXFP4_FORM

    def read(self) -> Tensor:
        """Reads whole rows, and returns this part of them in bfloat16."""
        return dequantise_mxfp4(*self._read())[..., self.columns.start : self.columns.stop]

    def codes(self) -> Codes:
        """Reads whole rows, and returns this part of them, which must begin and end with a block."""
        blocks, scales = self._read()
        first, last = self.columns.start // _BLOCK, -(-self.columns.stop // _BLOCK)
        values = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-3)
        powers = torch.ldexp(torch.ones(scales.shape), scales.int() - _BIAS)
        return Mxfp4Codes(values[..., self.columns.start : self.columns.stop], powers[..., first:last])

    def _read(self) -> tuple[Tensor, Tensor]:
        blocks, scales = (each if isinstance(each, Tensor) else each.read() for each in (self.blocks, self.scales))
        return blocks, scales


@dataclass(frozen=True, slots=True, eq=False)
class Mxfp4Codes(Codes):
    """Codes whose values are the bits of e2m1, uint8, and whose scales are powers of two."""

    def dequantise(self) -> Tensor:
        """Returns the numbers of the matrix, `[rows, columns]` float32."""
        numbers = replace(self, values=_numbers()[self.values.int()])
        return Codes.dequantise(numbers)


def _numbers() -> Tensor:
    """Returns the number of each code, `[16]`."""
    return torch.tensor((*_MAGNITUDES, *(-magnitude for magnitude in _MAGNITUDES)))


def dequantise_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Returns the numbers of a tensor in MXFP4.

    Args:
        blocks: `[..., num_blocks, 16]` uint8.
        scales: `[..., num_blocks]` uint8.

    Returns:
        `[..., num_blocks * 32]` bfloat16.
    """
    numbers = _numbers().to(torch.bfloat16)
    byte = torch.arange(256)
    pairs = torch.stack((numbers[byte & 15], numbers[byte >> 4]), dim=-1)
    powers = torch.ldexp(torch.ones(scales.shape), scales.int() - _BIAS).to(torch.bfloat16)
    return (pairs[blocks.int()].flatten(-2) * powers[..., None]).flatten(-2)


def join_mxfp4(tensors: Iterable[tuple[str, StoredTensor]]) -> Iterator[tuple[str, StoredTensor]]:
    """Yields the tensors of a checkpoint; two that are a matrix in MXFP4 become one, under the name of its blocks.

    Args:
        tensors: The name and the tensor of each.

    Raises:
        CheckpointError: One of two tensors is missing, or they do not belong together.
    """
    halves: dict[str, StoredTensor] = {}
    for name, tensor in tensors:
        if not name.endswith((BLOCKS, SCALES)) or tensor.dtype != torch.uint8:
            yield name, tensor
            continue
        stem, halves[name] = name.removesuffix(BLOCKS).removesuffix(SCALES), tensor
        if stem + BLOCKS in halves and stem + SCALES in halves:
            yield stem + BLOCKS, _join(stem, halves.pop(stem + BLOCKS), halves.pop(stem + SCALES))
    for name in halves:
        other = name.removesuffix(BLOCKS) + SCALES if name.endswith(BLOCKS) else name.removesuffix(SCALES) + BLOCKS
        raise CheckpointError(f"the checkpoint has {name} without {other}; fetch all of its files")


def _join(name: str, blocks: StoredTensor, scales: StoredTensor) -> Mxfp4Tensor:
    if [*blocks.shape] != [*scales.shape, _BLOCK // 2] or not scales.shape:
        raise CheckpointError(
            f"{name}{BLOCKS} has shape {[*blocks.shape]} and {name}{SCALES} has shape {[*scales.shape]}; the blocks "
            f"must have one dimension more, of {_BLOCK // 2} bytes"
        )
    return Mxfp4Tensor(blocks, scales, range(scales.shape[-1] * _BLOCK))


def warn_of_mxfp4(tensors: Iterable[StoredTensor], slots: Iterable[WeightSlot]) -> None:
    """Logs a warning about the memory that matrices in MXFP4 take, if the weight slots take dequantised ones."""
    found = [tensor for tensor in tensors if isinstance(tensor, Mxfp4Tensor)]
    if found and not any(slot.takes_codes for slot in slots):
        stored = sum(math.prod(each.shape) for tensor in found for each in (tensor.blocks, tensor.scales))
        logger.warning(
            "%d tensors in MXFP4 are dequantised at load: they take %.0f MiB in bfloat16, %.0f MiB in the checkpoint",
            len(found),
            sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in found) / 2**20,
            stored / 2**20,
        )

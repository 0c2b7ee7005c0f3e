"""`CodedMatrices`: the matrices of experts in 4 or 8 bits, as `experts` takes them.

    W[e, n, k] = (value of codes[e, n, k] - zeros[e, n, k // group]) · scales[e, n, k // group]

    kind          a code is
    int4, int8    an unsigned integer; without zero points, 8 or 128 stands for 0
    e4m3          a float of 8 bits, "fn": 4 bits of exponent, 3 of mantissa, no infinity
    e2m1          a float of 4 bits: 0, 0.5, 1, 1.5, 2, 3, 4 or 6, and the sign in the highest bit

Two codes of 4 bits share a byte, the first in its low half. A scale is a float32, or one byte s for 2^(s - 127).
e2m1 with such bytes and groups of 32 is MXFP4 (Open Compute Project, "Microscaling Formats (MX) Specification", 2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from .._library import find_library

__all__ = ["KINDS", "SPAN", "CodedMatrices", "Kind", "can_multiply_codes", "weight_of"]

SPAN = 32
"""Columns that have the same scale in every kind: a group has a multiple of this number, or is the whole row."""

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of code.

    Attributes:
        bits: Bits of a code, 4 or 8.
        zero: What is subtracted from the value of a code where a matrix has no zero points.
        has_zeros: Whether a matrix of this kind may have zero points.
    """

    bits: int
    zero: int = 0
    has_zeros: bool = False


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "int4": Kind(4, zero=8, has_zeros=True),
        "int8": Kind(8, zero=128, has_zeros=True),
        "e4m3": Kind(8),
        "e2m1": Kind(4),
    }
)
"""The kinds of codes by their names."""


@dataclass(frozen=True, slots=True, eq=False)
class CodedMatrices:
    """The matrices of all experts, `[num_experts, num_rows, num_columns]`, in 4 or 8 bits.

    Attributes:
        kind: A name in `KINDS`.
        codes: `[num_experts, num_rows, num_columns * bits / 8]` uint8, contiguous.
        scales: `[num_experts, num_rows, num_groups]` float32, or uint8 for powers of two; contiguous.
        zeros: `[num_experts, num_rows, num_groups]` uint8, contiguous, or None for those of the kind.
        group: Neighbouring columns that share a scale: a multiple of 32, or `num_columns`. The last group may have
            fewer.
    """

    kind: str
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    group: int

    def __post_init__(self) -> None:
        num_groups = -(-self.shape[2] // max(1, self.group))
        shape, is_one_group = (*self.codes.shape[:2], num_groups), num_groups == 1 and self.group >= self.shape[2]
        if not is_one_group and self.group % SPAN:
            raise ValueError(
                f"experts: groups of {self.group} columns; they must be multiples of {SPAN}, or whole rows"
            )
        if self.scales.shape != shape or (self.zeros is not None and self.zeros.shape != shape):
            raise ValueError(f"experts: scales of shape {[*self.scales.shape]}, and zeros, must have shape {[*shape]}")
        if self.zeros is not None and not KINDS[self.kind].has_zeros:
            raise ValueError(f"experts: codes of kind {self.kind} have no zero points")

    @property
    def shape(self) -> torch.Size:
        """Shape of the matrices that the codes stand for."""
        return torch.Size((*self.codes.shape[:2], self.codes.shape[2] * 8 // KINDS[self.kind].bits))

    def __len__(self) -> int:
        return len(self.codes)

    def is_contiguous(self) -> bool:
        """Returns whether all tensors are contiguous."""
        tensors = (self.codes, self.scales, self.zeros)
        return all(tensor is None or tensor.is_contiguous() for tensor in tensors)

    def dequantise(self, expert: int, dtype: torch.dtype) -> Tensor:
        """Returns the matrix of one expert, `[num_rows, num_columns]`, computed in at least float32."""
        wide = torch.promote_types(dtype, torch.float32)
        codes, kind = self.codes[expert], KINDS[self.kind]
        if kind.bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)
        numbers = _values(self.kind, codes.device)[codes.int()].to(wide)
        group = torch.arange(numbers.shape[1], device=codes.device) // max(1, self.group)
        zeros = kind.zero if self.zeros is None else self.zeros[expert].to(wide)[:, group]
        scales = self.scales[expert].to(wide)
        if self.scales.dtype == torch.uint8:
            scales = torch.exp2(scales - 127)
        return ((numbers - zeros) * scales[:, group]).to(dtype)


def can_multiply_codes(device: str) -> bool:
    """Returns whether a device type multiplies by codes as they are: on a CPU only compiled kernels do."""
    return device != "cpu" or find_library() is not None


def weight_of(matrices: Tensor | CodedMatrices, expert: int, dtype: torch.dtype) -> Tensor:
    """Returns the matrix of one expert in a dtype, dequantised if it is in codes."""
    return matrices.dequantise(expert, dtype) if isinstance(matrices, CodedMatrices) else matrices[expert].to(dtype)


def _values(kind: str, device: torch.device) -> Tensor:
    """Returns the value of each code, `[2 ** bits]` float32."""
    codes = torch.arange(2 ** KINDS[kind].bits, device=device)
    if kind == "e4m3":
        return codes.to(torch.uint8).view(torch.float8_e4m3fn).float()
    if kind == "e2m1":
        return torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], device=device)
    return codes.float()

"""Matrices as bitsandbytes and torchao store them, written from the published layouts.

Each writer returns the tensors of a module, and the numbers that they stand for.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor

from float_files import Write
from gptq_files import Packed

__all__ = ["FP4", "NF4", "bnb_4bit", "bnb_int8", "torchao_int4", "torchao_intx"]

NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
"""The quantiles of a normal distribution by which bitsandbytes stores numbers."""

FP4 = [0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12]
FP4 = [*FP4, *(-number for number in FP4)]
"""Its floats of 4 bits, divided by the largest."""


def bnb_4bit(kind: str = "nf4", *, block: int = 64, nested: bool = False, storage: torch.dtype = torch.uint8) -> Write:
    """Returns the writer of places in a table, with scales of blocks that may be quantised themselves.

    The packed bytes are the memory of numbers of the type `storage`.
    """
    table = torch.tensor(NF4 if kind == "nf4" else FP4)

    def write(matrix: Tensor) -> Packed:
        flat = matrix.flatten()
        absmax = torch.stack([part.abs().max() for part in flat.split(block)])
        state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "float32", "shape": [*matrix.shape]}
        tensors = {"weight.absmax": absmax, "weight.quant_map": table.clone()}
        if nested:
            coded, absmax, fields = _nest(absmax)
            tensors |= coded
            state |= fields
        spread = absmax.repeat_interleave(block)[: len(flat)]
        codes = ((flat / spread).unsqueeze(-1) - table).abs().argmin(-1).to(torch.uint8)
        packed = codes[::2] << 4 | torch.nn.functional.pad(codes[1::2], (0, len(flat) % 2))
        tensors["weight"] = packed.view(storage).view(-1, 1)
        tensors[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(json.dumps(state).encode())).byte()
        return Packed(tensors, (table[codes.int()] * spread).view_as(matrix))

    return write


def _nest(absmax: Tensor, block: int = 256) -> tuple[dict[str, Tensor], Tensor, dict[str, Any]]:
    """Quantises the scales of blocks; returns their tensors, the dequantised scales, and the fields of the state."""
    table, offset = torch.linspace(-1, 1, 256), absmax.mean()
    outer = torch.stack([part.abs().max() for part in (absmax - offset).split(block)])
    spread = outer.repeat_interleave(block)[: len(absmax)]
    codes = (((absmax - offset) / spread).unsqueeze(-1) - table).abs().argmin(-1)
    tensors = {
        "weight.absmax": codes.to(torch.uint8),
        "weight.nested_absmax": outer,
        "weight.nested_quant_map": table,
    }
    fields = {"nested_blocksize": block, "nested_dtype": "float32", "nested_offset": float(offset)}
    return tensors, table[codes] * spread + offset, fields


def bnb_int8(matrix: Tensor) -> Packed:
    """Writes 8-bit integers with the largest number of each row."""
    largest = matrix.abs().amax(1)
    values = (matrix * 127 / largest[:, None]).round().to(torch.int8)
    tensors = {"weight": values, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return Packed(tensors, values * largest[:, None] / 127)


def torchao_intx(bits: int = 8, group: int | None = None, *, symmetric: bool = True) -> Write:
    """Returns the writer of a number in each byte, in groups of columns, or in rows."""
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1

    def write(matrix: Tensor) -> Packed:
        groups = matrix.unflatten(1, (-1, group or matrix.shape[1]))
        least, most = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scales = torch.maximum(-least, most) / high if symmetric else (most - least) / (high - low)
        zeros = torch.zeros_like(scales) if symmetric else low - (least / scales).round()
        values = (groups / scales + zeros).round().clamp(low, high)
        names = ("_weight_qdata", "_weight_scale", "_weight_zero_point")
        parts = (values.flatten(1).to(torch.int8), scales.squeeze(-1), zeros.squeeze(-1).to(torch.int8))
        return Packed(dict(zip(names, parts, strict=True)), ((values - zeros) * scales).flatten(1))

    return write


def torchao_int4(group: int) -> Write:
    """Returns the writer of two numbers in each byte, whose zero points are numbers of the matrix."""

    def write(matrix: Tensor) -> Packed:
        groups = matrix.unflatten(1, (math.ceil(matrix.shape[1] / group), group))
        least, most = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scales = (most - least) / 15
        zeros = least + 8 * scales
        values = ((groups - zeros) / scales).round().clamp(-8, 7)
        nibbles = values.flatten(1).to(torch.int8)
        tensors = {
            "_weight_qdata": nibbles[:, ::2] & 15 | nibbles[:, 1::2] << 4,
            "_weight_scale": scales.squeeze(-1).t(),
            "_weight_zero_point": zeros.squeeze(-1).t(),
        }
        return Packed(tensors, (values * scales + zeros).flatten(1))

    return write

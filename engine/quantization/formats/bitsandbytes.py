"""`BitsAndBytesFormat` (`quant_method: bitsandbytes`): 4 bits as places in a table of 16 numbers, or 8-bit integers.

4 bits (Dettmers et al., 2023, arXiv:2305.14314). The rows of a matrix lie one after another, in blocks of 64 numbers:

    weight [N * K / 2, 1] uint8, the first number of a byte in its upper half,   weight.quant_map [16] float32
        (or its bytes as fewer floats, which are the memory of those bytes: `bnb_4bit_quant_storage`)
    weight.absmax [num_blocks] float32,   weight.quant_state.bitsandbytes__nf4 uint8, an object in JSON

    W.flatten()[i] = quant_map[code[i]] * absmax[i // 64]

With double quantisation `weight.absmax` is uint8, and the scale of block j is `nested_quant_map[absmax[j]] *
nested_absmax[j // 256] + nested_offset`.

8 bits (Dettmers et al., 2022, arXiv:2208.07339): `weight` [N, K] int8 and `SCB` [N] float32, the largest number of each
row. Their product with inputs is not rounded here as it is there, and needs no threshold for large inputs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, quote
from ...weights.codes import Codes, QuantForm
from ...weights.quantised_matrix import QuantisedMatrix, numbers_of
from ...weights.tensor_layout import misshapen
from ...weights.tensor_view import StoredTensor
from ..checkpoint_format import CheckpointFormat
from ..settings import check_fields, flag, module_names, one_of

__all__ = ["FORMAT", "BitsAndBytesFormat"]

STATE = "weight.quant_state.bitsandbytes__"
KINDS = ("nf4", "fp4")
NESTED = ("weight.nested_absmax", "weight.nested_quant_map")
INT8_MAX = 127

STORAGES = {"uint8": torch.uint8, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""Values of `bnb_4bit_quant_storage` -> the number type whose memory holds the packed bytes."""

FIELDS = (
    *("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit", "bnb_4bit_quant_type"),
    *("bnb_4bit_quant_storage", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype", "llm_int8_skip_modules"),
    *("llm_int8_threshold", "llm_int8_has_fp16_weight", "llm_int8_enable_fp32_cpu_offload"),
)
"""The fields of the config. The last five change no number of the weights."""


@dataclass(frozen=True, slots=True)
class TableState:
    """The settings of a matrix of 4 bits, which it has in JSON.

    Attributes:
        shape: `(N, K)`.
        block: Neighbouring numbers that share a scale.
        nested_block: Neighbouring scales that share a scale of scales; 0 without double quantisation.
        nested_offset: What is added to each scale with double quantisation.
    """

    shape: tuple[int, int]
    block: int
    nested_block: int = 0
    nested_offset: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class TableMatrix(QuantisedMatrix):
    """A matrix of 4 bits. Its blocks do not end with rows, so its numbers have no scales of rows.

    Attributes:
        state: Its settings.
    """

    state: TableState

    def codes(self) -> Codes:
        """Reads whole rows, and returns this part of them, dequantised, with scales of 1."""
        start, end = (row * self.state.shape[1] for row in (self.rows.start, self.rows.stop))
        stored = self.tensors["weight"]
        together = 2 * stored.dtype.itemsize
        first = start // together
        packed = numbers_of(stored.narrow(0, first, -(-end // together) - first)).view(torch.uint8).flatten()
        places = torch.stack((packed >> 4, packed & 15), dim=-1).flatten()[start - together * first :][: end - start]
        table = numbers_of(self.tensors["weight.quant_map"]).float()
        blocks = torch.arange(start, end) // self.state.block
        numbers = table[places.int()] * self._absmax(start, end)[blocks - start // self.state.block]
        values = numbers.view(len(self.rows), -1)[:, self.columns.start : self.columns.stop]
        return Codes(values, torch.ones(len(self.rows), 1))

    def _absmax(self, start: int, end: int) -> Tensor:
        """Returns the scales of the blocks of numbers `start` to `end`, float32."""
        first, last = start // self.state.block, -(-end // self.state.block)
        absmax = numbers_of(self.tensors["weight.absmax"].narrow(0, first, last - first))
        if not self.state.nested_block:
            return absmax.float()
        nested_absmax, table = (numbers_of(self.tensors[leaf]).float() for leaf in NESTED)
        outer = nested_absmax[torch.arange(first, last) // self.state.nested_block]
        return table[absmax.int()] * outer + self.state.nested_offset


@dataclass(frozen=True, slots=True, eq=False)
class Int8Matrix(QuantisedMatrix):
    """A matrix of 8-bit integers."""

    def codes(self) -> Codes:
        """Reads the numbers of this part."""
        part = self.tensors["weight"].narrow(0, self.rows.start, len(self.rows))
        values = numbers_of(part.narrow(1, self.columns.start, len(self.columns)))
        largest = numbers_of(self.tensors["SCB"].narrow(0, self.rows.start, len(self.rows)))
        return Codes(values, largest.float().reshape(-1, 1) / INT8_MAX)


class BitsAndBytesFormat(CheckpointFormat):
    """The format of bitsandbytes."""

    leaves = (
        *(f"{STATE}{kind}" for kind in KINDS),
        *("weight.absmax", "weight.quant_map", *NESTED, "weight", "SCB", "weight_format"),
    )

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        check_fields(config, FIELDS)
        self._is_8bit = bool(config.get("load_in_8bit", config.get("_load_in_8bit", False)))
        one_of(config, "bnb_4bit_quant_type", KINDS, default="fp4")
        one_of(config, "bnb_4bit_quant_storage", (*STORAGES, None))
        flag(config, "bnb_4bit_use_double_quant", default=False)
        module_names(config, "llm_int8_skip_modules")

    @property
    def planned_form(self) -> QuantForm:
        """The form of all matrices."""
        return INT8_FORM if self._is_8bit else TABLE_FORM

    def join_module(self, module: str, tensors: Mapping[str, StoredTensor]) -> Iterable[tuple[str, StoredTensor]]:
        """Yields the matrix of a module."""
        states = [leaf for leaf in self.leaves if leaf.startswith(STATE) and leaf in tensors]
        if states:
            yield "weight", _join_table(module, states, tensors)
        elif {"weight.absmax", "weight.quant_map", *NESTED} & tensors.keys():
            raise CheckpointError(f"{module} has {', '.join(tensors)}, and no {STATE}nf4 or fp4; fetch all files")
        else:
            yield "weight", _join_int8(module, tensors)


def _join_int8(module: str, tensors: Mapping[str, StoredTensor]) -> Int8Matrix:
    weight, largest = (_get(module, tensors, leaf) for leaf in ("weight", "SCB"))
    if weight.dtype != torch.int8 or len(weight.shape) != 2:
        raise CheckpointError(
            f"{module}.weight is of {weight.dtype} and has shape {list(weight.shape)}; with SCB beside it, it must be "
            "a matrix of torch.int8; fetch the checkpoint again"
        )
    if list(largest.shape) != [weight.shape[0]]:
        raise misshapen(f"{module}.SCB", largest.shape, [weight.shape[0]])
    order = int(numbers_of(tensors["weight_format"])) if "weight_format" in tensors else 0
    if order != 0:
        raise CheckpointError(
            f"{module}.weight_format is {order}: the numbers are in the order of a GPU's kernel; save the model again "
            "with bitsandbytes 0.45 or newer, which stores them row by row (0)"
        )
    return Int8Matrix(module, INT8_FORM, tensors, range(weight.shape[0]), range(weight.shape[1]))


def _join_table(module: str, states: list[str], tensors: Mapping[str, StoredTensor]) -> TableMatrix:
    if len(states) != 1:
        raise CheckpointError(f"{module} has {' and '.join(states)}; it must have one of them; fetch it again")
    state = _read_state(module, states[0], tensors)
    count = state.shape[0] * state.shape[1]
    num_blocks = -(-count // state.block)
    together = 2 * tensors["weight"].dtype.itemsize if "weight" in tensors else 2
    asked = {"weight": [-(-count // together), 1], "weight.absmax": [num_blocks], "weight.quant_map": [16]}
    if state.nested_block:
        asked |= {NESTED[0]: [-(-num_blocks // state.nested_block)], NESTED[1]: [256]}
    for leaf, shape in asked.items():
        if list(_get(module, tensors, leaf).shape) != shape:
            raise misshapen(f"{module}.{leaf}", tensors[leaf].shape, shape)
    absmax_is_coded = tensors["weight.absmax"].dtype == torch.uint8
    if tensors["weight"].dtype not in STORAGES.values() or absmax_is_coded != bool(state.nested_block):
        raise CheckpointError(
            f"{module}.weight is of {tensors['weight'].dtype} and weight.absmax of {tensors['weight.absmax'].dtype}; "
            f"with {states[0]} they must be of torch.uint8 (or a type in bnb_4bit_quant_storage) and of "
            f"{torch.uint8 if state.nested_block else torch.float32}; fetch the checkpoint again"
        )
    return TableMatrix(module, TABLE_FORM, tensors, range(state.shape[0]), range(state.shape[1]), state)


def _read_state(module: str, leaf: str, tensors: Mapping[str, StoredTensor]) -> TableState:
    """Reads the settings of a matrix of 4 bits."""
    text = bytes(numbers_of(tensors[leaf]).tolist())
    try:
        fields = json.loads(text)
        num_rows, num_columns = fields["shape"]
        state = TableState((num_rows, num_columns), fields["blocksize"])
        if "nested_blocksize" in fields:
            state = TableState(state.shape, state.block, fields["nested_blocksize"], float(fields["nested_offset"]))
        sizes = [*state.shape, state.block, *([state.nested_block] if "nested_blocksize" in fields else [])]
        if fields["quant_type"] != leaf.removeprefix(STATE) or not all(type(n) is int and n > 0 for n in sizes):
            raise ValueError(fields["quant_type"], sizes)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{module}.{leaf} is {quote(text.decode(errors='replace'))}; it must be an object in JSON with quant_type "
            f"{leaf.removeprefix(STATE)!r}, shape, blocksize, and with double quantisation nested_blocksize and "
            "nested_offset; fetch it again"
        ) from error
    return state


def _get(module: str, tensors: Mapping[str, StoredTensor], leaf: str) -> StoredTensor:
    if leaf not in tensors:
        raise CheckpointError(f"{module} has {', '.join(tensors)}, and no {leaf}; fetch all files")
    return tensors[leaf]


TABLE_FORM = QuantForm("bitsandbytes", "table", 4)
INT8_FORM = QuantForm("bitsandbytes", "int", 8)
FORMAT = BitsAndBytesFormat

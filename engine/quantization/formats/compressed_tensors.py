"""`CompressedTensorsFormat` (`quant_method: compressed-tensors`): what llm-compressor writes.

A matrix `[N, K]` is stored by rows, as one of these, with `weight_scale` beside it:

    weight         [N, K] int8 or e4m3               int-quantized, float-quantized, naive-quantized, mxfp8-quantized
    weight_packed  [N, ceil(K * bits / 32)] int32    pack-quantized: integers with 2 ** (bits - 1) added
    weight_packed  [N, K * bits / 8] uint8           nvfp4-, mxfp4- and mxfp6-pack-quantized: small floats

The numbers of a packed row are its bits one after another, the first number in the lowest ones.

`weight_shape` has N and K of packed integers. Integers may have zero points: `weight_zero_point`, packed along N where
the integers are packed. Scales of mx formats are exponents of two. Those of nvfp4 are divided by `weight_global_scale`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import CheckpointError
from ...weights.codes import Codes, InputQuant, QuantForm
from ...weights.packed_bits import VALUES_TOGETHER, unpack_bits
from ...weights.quantised_matrix import QuantisedMatrix, numbers_of
from ...weights.tensor_layout import misshapen
from ...weights.tensor_view import StoredTensor
from ..checkpoint_format import PLAIN, CheckpointFormat
from ..compressed_tensors_config import PACKED, SMALL_FLOATS, CompressedTensorsConfig, Group, Inputs
from ..fp4_matrix import MAGNITUDES
from ..fp8_matrix import read_scale, scale_numbers
from ..tensor_checks import check_groups, check_shape, check_there

__all__ = ["FORMAT", "CompressedTensorsFormat"]

NAME = "compressed-tensors"

E2M3 = tuple(mantissa / 8 for mantissa in range(8)) + tuple(
    2.0**exponent * (1 + mantissa / 8) for exponent in range(3) for mantissa in range(8)
)
SMALL_NUMBERS = {4: MAGNITUDES, 6: E2M3}
"""Bits of a small float -> its numbers without their sign, which is the highest bit (OCP Microscaling 1.0, 2023)."""

KV_SCALES = ("k_scale", "v_scale", "k_zero_point", "v_zero_point")


@dataclass(frozen=True, slots=True, eq=False)
class CompressedMatrix(QuantisedMatrix):
    """A matrix in a layout of compressed-tensors.

    Attributes:
        bits: Bits of a stored number. Layers have integers of 4 or of 8 bits, of which others are a part.
    """

    bits: int

    def codes(self) -> Codes:
        """Reads the numbers of this part: of packed tensors, whole words of the rows."""
        order = self._order
        values, zeros = self._values(), self._zeros()
        if values.dtype == torch.uint8 and self.form.kind == "table":
            numbers = torch.tensor(SMALL_NUMBERS[self.bits])
            values = torch.cat((numbers, -numbers))[values.int()]
        elif self.form.kind == "int":
            values = _shifted(values, to=torch.int8 if zeros is None else torch.uint8, bits=self.bits)
        if zeros is not None:
            zeros = _shifted(zeros, to=torch.uint8, bits=self.bits)
        return Codes(values, self._scales(), zeros, self.column_groups if order is None else order)

    @property
    def _order(self) -> Tensor | None:
        """The group of each column of this part, if the columns of a group may be anywhere."""
        if not self.form.act_order:
            return None
        return numbers_of(self.tensors["weight_g_idx"].narrow(0, self.columns.start, len(self.columns))).long()

    @property
    def _groups(self) -> range:
        """The groups whose scales this part needs: any, if the columns of a group may be anywhere."""
        return range(self.tensors["weight_scale"].shape[1]) if self.form.act_order else self.group_range

    def _values(self) -> Tensor:
        packed = self.tensors.get("weight_packed")
        if packed is not None:
            return _read_bits(packed.narrow(0, self.rows.start, len(self.rows)), self.bits, self.columns)
        part = self.tensors["weight"].narrow(0, self.rows.start, len(self.rows))
        return numbers_of(part.narrow(1, self.columns.start, len(self.columns))).contiguous()

    def _scales(self) -> Tensor:
        """Returns `[rows, num_groups]` float32."""
        scales = scale_numbers(self._of_groups("weight_scale"))
        divisor = self.tensors.get("weight_global_scale")
        return scales if divisor is None else scales / numbers_of(divisor).float()

    def _zeros(self) -> Tensor | None:
        if "weight_zero_point" not in self.tensors:
            return None
        zeros = self.tensors["weight_zero_point"]
        if zeros.dtype != torch.int32:
            return self._of_groups("weight_zero_point")
        part = zeros.narrow(1, self._groups.start, len(self._groups))
        return _read_bits(part, self.bits, self.rows, dim=0).t().contiguous()

    def _of_groups(self, leaf: str) -> Tensor:
        """Returns `[rows, num_groups]`, the numbers of a tensor with one for the matrix, a row, a group or a block."""
        tensor = self.tensors[leaf]
        if math.prod(tensor.shape) == 1:
            return numbers_of(tensor).reshape(1, 1).expand(len(self.rows), 1)
        block, groups = self.form.row_block, self._groups
        first, end = self.rows.start // block, -(-self.rows.stop // block)
        part = numbers_of(tensor.narrow(0, first, end - first).narrow(1, groups.start, len(groups)))
        return part[torch.arange(self.rows.start, self.rows.stop) // block - first]


def _read_bits(tensor: StoredTensor, bits: int, kept: range, dim: int = 1) -> Tensor:
    """Returns `[rows, kept]` uint8: some numbers of packed rows, or of packed columns (`dim` 0)."""
    first = kept.start // VALUES_TOGETHER * VALUES_TOGETHER
    width = 8 * tensor.dtype.itemsize
    start, end = first * bits // width, -(-kept.stop * bits // width)
    words = numbers_of(tensor.narrow(dim, start, end - start))
    words = words if dim else words.t()
    whole = F.pad(words, (0, -words.shape[1] % bits))  # The last number may end before its word does.
    return unpack_bits(whole, bits)[:, kept.start - first : kept.stop - first].contiguous()


def _shifted(numbers: Tensor, *, to: torch.dtype, bits: int) -> Tensor:
    """Returns integers as int8, or with 2 ** (bits - 1) added as uint8. Those that are uint8 have it added already."""
    if numbers.dtype == to:
        return numbers
    half, numbers = 1 << bits - 1, numbers.view(torch.uint8)  # Sums of uint8 wrap around.
    return (numbers - half if to == torch.int8 else numbers + half).view(to)


class CompressedTensorsFormat(CheckpointFormat):
    """The format of the library compressed-tensors, version 0.20 and earlier."""

    leaves = (
        *("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
        *("weight_global_scale", "input_scale", "input_zero_point", "input_global_scale", *KV_SCALES),
    )

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self._settings = CompressedTensorsConfig(config)

    @property
    def planned_form(self) -> QuantForm | None:
        """The form of the matrices of the first group."""
        return _form(self._settings.groups[0]) if self._settings.groups else None

    def notes(self) -> Iterator[str]:
        """Yields a sentence about what is asked of inputs, and of a KV cache, and is not done."""
        for group in self._settings.groups:
            if group.inputs is not None and group.inputs.quant is None:
                yield (
                    f"the inputs of layers are not quantised, which is more exact: 'quantization_config.{group.field}."
                    f"input_activations' asks for {group.inputs.text}, and no layer does that"
                )
        if not self._settings.keeps_kv_scales:
            yield (
                "the checkpoint's scales of a KV cache are not used: 'quantization_config.kv_cache_scheme' is not one "
                "of 8-bit floats with a scale for all tokens of a layer or of a head"
            )

    def join_module(self, module: str, tensors: Mapping[str, StoredTensor]) -> Iterable[tuple[str, StoredTensor]]:
        """Yields the matrix of a module, its scales of a KV cache, and tensors that do not belong there."""
        given = {leaf: tensor for leaf, tensor in tensors.items() if leaf not in KV_SCALES}
        if self._settings.keeps_kv_scales:
            yield from ((leaf, tensor) for leaf, tensor in tensors.items() if leaf in KV_SCALES)
        if given.keys() <= {"weight"} and all(tensor.dtype in PLAIN for tensor in given.values()):
            yield from given.items()
            return
        group = self._settings.group_of(module)
        _check_compressed(module, given)
        kinds = _kinds(group, given)
        check_there(module, given, kinds)
        stored = {leaf: given[leaf] for leaf in kinds if leaf.startswith("weight")}
        num_rows, num_columns = _check_shapes(module, group, stored)
        dtype = given["weight_scale"].dtype
        form = _form(group, dtype if dtype in PLAIN else torch.float32, has_order=_has_order(module, group, stored))
        form = replace(form, inputs=_inputs(module, group.inputs, given))
        yield "weight", CompressedMatrix(module, form, stored, range(num_rows), range(num_columns), group.weights.bits)
        yield from ((leaf, tensor) for leaf, tensor in given.items() if leaf not in kinds)


def _form(group: Group, scale_dtype: torch.dtype = torch.float32, *, has_order: bool = False) -> QuantForm:
    weights = group.weights
    row_block, group_size = weights.block or (1, weights.group_size)
    return QuantForm(
        NAME,
        "table" if group.format in SMALL_FLOATS else "fp8" if weights.is_float else "int",
        weights.bits if weights.is_float else 4 if weights.bits <= 4 else 8,
        group_size,
        has_zeros=not weights.symmetric,
        act_order=has_order,
        row_block=row_block,
        inputs=group.inputs.quant if group.inputs else None,
        scale_dtype=scale_dtype,
    )


def _kinds(group: Group, given: Mapping[str, StoredTensor]) -> dict[str, torch.dtype | None]:
    """Returns the tensors that a matrix of a group has, the one with its numbers first, and their number types."""
    weights, inputs, nvfp4 = group.weights, group.inputs, group.format.startswith("nvfp4")
    kinds: dict[str, torch.dtype | None] = {}
    if group.format == PACKED:
        shape = given.get("weight_shape")
        is_short = shape is not None and shape.dtype == torch.int32
        kinds = {"weight_packed": torch.int32, "weight_shape": torch.int32 if is_short else torch.int64}
    elif group.format in SMALL_FLOATS:
        kinds["weight_packed"] = torch.uint8
    else:
        kinds["weight"] = torch.float8_e4m3fn if weights.is_float else torch.int8
    kinds["weight_scale"] = torch.uint8 if group.format.startswith("mx") else torch.float8_e4m3fn if nvfp4 else None
    if not weights.symmetric:
        # Older versions of the library did not pack them.
        is_packed = (
            group.format == PACKED and "weight_zero_point" in given and given["weight_zero_point"].dtype != torch.int8
        )
        kinds["weight_zero_point"] = torch.int32 if is_packed else torch.int8
    if weights.reordered:
        kinds["weight_g_idx"] = torch.int32
    if nvfp4:
        kinds["weight_global_scale"] = None
    if inputs is not None and inputs.static:
        kinds["input_scale"] = None
        if not inputs.symmetric:
            kinds["input_zero_point"] = torch.int8
    if inputs is not None and nvfp4:
        kinds["input_global_scale"] = None
    return kinds


def _check_compressed(module: str, given: Mapping[str, StoredTensor]) -> None:
    """Raises if the weights are floats with scales beside them, by which the library rounds them in each product."""
    weight = given.get("weight")
    if weight is not None and weight.dtype in PLAIN:
        raise CheckpointError(
            f"{module}.weight is of {weight.dtype}, and {', '.join(sorted(given.keys() - {'weight'}))} is beside it: "
            "the checkpoint was saved before its weights were compressed ('quantization_config.quantization_status'), "
            "which is not implemented; save it compressed"
        )


def _check_shapes(module: str, group: Group, stored: Mapping[str, StoredTensor]) -> tuple[int, int]:
    """Returns the rows and columns of a matrix, after a check that its tensors have the shapes that go with them."""
    weights, first = group.weights, next(iter(stored))
    if len(stored[first].shape) != 2:
        raise CheckpointError(
            f"{module}.{first} has shape {[*stored[first].shape]}; it must be a matrix; fetch it again"
        )
    num_rows, num_columns = stored[first].shape
    if group.format == PACKED:
        num_rows, num_columns = _packed_shape(module, group, stored)
    elif group.format in SMALL_FLOATS:
        num_columns = num_columns * 8 // weights.bits
    scales = [num_rows, check_groups(module, num_columns, weights.group_size)]
    if weights.strategy == "tensor":
        scales = [1]
    elif weights.block:
        scales = [-(-num_rows // weights.block[0]), -(-num_columns // weights.block[1])]
    asked = {
        "weight_scale": scales,
        "weight_zero_point": scales,
        "weight_global_scale": [1],
        "weight_g_idx": [num_columns],
    }
    if "weight_zero_point" in stored and stored["weight_zero_point"].dtype == torch.int32:
        asked["weight_zero_point"] = [-(-num_rows * weights.bits // 32), *scales[1:]]
    for leaf in stored.keys() & asked.keys():
        if [*stored[leaf].shape] != asked[leaf] and ([*stored[leaf].shape], asked[leaf]) != ([], [1]):
            why = f"{group.field}.weights, for a matrix of {num_rows} rows and {num_columns} columns,"
            check_shape(module, leaf, stored[leaf], asked[leaf], why)
    return num_rows, num_columns


def _packed_shape(module: str, group: Group, stored: Mapping[str, StoredTensor]) -> tuple[int, int]:
    """Returns the rows and columns that `weight_shape` has for packed integers."""
    check_shape(module, "weight_shape", stored["weight_shape"], [2], f"{group.field}.format")
    num_rows, num_columns = numbers_of(stored["weight_shape"]).tolist()
    why = f"{group.field}.weights.num_bits, with {[num_rows, num_columns]} in {module}.weight_shape,"
    num_words = -(-num_columns * group.weights.bits // 32)
    check_shape(module, "weight_packed", stored["weight_packed"], [num_rows, num_words], why)
    return num_rows, num_columns


def _has_order(module: str, group: Group, stored: Mapping[str, StoredTensor]) -> bool:
    """Returns whether the columns of a group are not neighbours. The library takes -1 for an order that was not set."""
    if not group.weights.reordered:
        return False
    order, size = numbers_of(stored["weight_g_idx"]), group.weights.group_size
    if not size or bool((order == -1).any()) or torch.equal(order.long(), torch.arange(len(order)) // size):
        return False
    num_groups = len(order) // size
    if not bool(((order >= 0) & (order < num_groups)).all()):
        raise CheckpointError(
            f"{module}.weight_g_idx has numbers from {int(order.min())} to {int(order.max())}, and there are "
            f"{num_groups} groups of {size} columns; fetch the checkpoint again"
        )
    return True


def _inputs(module: str, inputs: Inputs | None, given: Mapping[str, StoredTensor]) -> InputQuant | None:
    """Returns how the input of a module is quantised, with its scale if that is fixed."""
    if inputs is None or inputs.quant is None or not inputs.static:
        return inputs.quant if inputs else None
    scale = read_scale(module, "input_scale", given)
    if inputs.symmetric:
        return replace(inputs.quant, scale=scale)
    if math.prod(given["input_zero_point"].shape) != 1:
        raise misshapen(f"{module}.input_zero_point", given["input_zero_point"].shape, [1])
    return replace(inputs.quant, scale=scale, zero=int(numbers_of(given["input_zero_point"])))


FORMAT = CompressedTensorsFormat

"""`TorchAoFormat` (`quant_method: torchao`): integers of torchao with plain inputs, as transformers writes them.

A weight `X.weight` of torchao consists of several tensors:

    Int8WeightOnlyConfig, IntxWeightOnlyConfig      X._weight_qdata [N, K] int8,   X._weight_scale [N, G] or [N],
                                                    X._weight_zero_point [N, G] int8
        W[n, k] = (qdata[n, k] - zero_point[n, g]) * scale[n, g]

    Int4WeightOnlyConfig, in the plain layout       X._weight_qdata [N, K / 2], two signed numbers in a byte, the first
                                                    in its lower half,   X._weight_scale and _zero_point [G, N] floats
        W[n, k] = qdata[n, k] * scale[g, n] + zero_point[g, n]

The zero points of 4 bits are numbers of the matrix and no integers, so these matrices are dequantised.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...weights.codes import Codes, QuantForm
from ...weights.quantised_matrix import QuantisedMatrix, numbers_of
from ...weights.tensor_layout import misshapen
from ...weights.tensor_view import StoredTensor
from ..checkpoint_format import CheckpointFormat
from ..settings import check_fields, module_names, one_of, refuse_set, unsupported

__all__ = ["FORMAT", "TorchAoFormat"]

QDATA, SCALE, ZERO_POINT = (f"_weight_{name}" for name in ("qdata", "scale", "zero_point"))
OTHERS = tuple(f"_weight_{name}" for name in ("scale_and_zero", "act_pre_scale", "per_tensor_scale"))
"""The tensors of kinds of weights that are not implemented."""

FIELDS = (
    *("quant_type", "quant_type_kwargs"),
    *("modules_to_not_convert", "include_input_output_embeddings", "untie_embedding_weights"),
)
"""The fields of the config. The last three change no number: the tensors say which layers are quantised."""

KINDS = ("Int8WeightOnlyConfig", "IntxWeightOnlyConfig", "Int4WeightOnlyConfig")

BITS = {"int8": 8, **{f"int{bits}": bits for bits in range(1, 8)}}
"""Number types of IntxWeightOnlyConfig -> their bits."""


@dataclass(frozen=True, slots=True, eq=False)
class Int8Matrix(QuantisedMatrix):
    """A matrix with a number in each byte."""

    def codes(self) -> Codes:
        """Reads the numbers of this part."""
        values = self._part(QDATA, self.columns)
        scales, zeros = self._part(SCALE, self.group_range).float(), self._part(ZERO_POINT, self.group_range)
        if self.form.has_zeros:
            least = -(1 << (self.form.bits - 1))
            values, zeros = ((each.int() - least).to(torch.uint8) for each in (values, zeros))
            return Codes(values, scales, zeros, self.column_groups)
        if zeros.any():
            raise CheckpointError(
                f"{self.name}.{ZERO_POINT} is not 0, and config field 'quantization_config.quant_type' is of symmetric "
                "integers; fetch the checkpoint again"
            )
        return Codes(values, scales, groups=self.column_groups)

    def _part(self, leaf: str, kept: range) -> Tensor:
        """Returns `[rows, kept]`, also of a tensor that has one number for each row."""
        part = self.tensors[leaf].narrow(0, self.rows.start, len(self.rows))
        if len(part.shape) == 2:
            part = part.narrow(1, kept.start, len(kept))
        return numbers_of(part).reshape(len(self.rows), -1)


@dataclass(frozen=True, slots=True, eq=False)
class Int4Matrix(QuantisedMatrix):
    """A matrix with two numbers in each byte."""

    def codes(self) -> Codes:
        """Reads the numbers of this part, and returns them dequantised, with scales of 1."""
        first, end, groups = self.columns.start // 2, -(-self.columns.stop // 2), self.group_range
        part = self.tensors[QDATA].narrow(0, self.rows.start, len(self.rows)).narrow(1, first, end - first)
        bytes_ = numbers_of(part).view(torch.int8)
        pairs = torch.stack((bytes_ << 4 >> 4, bytes_ >> 4), dim=-1).flatten(1)
        start = self.columns.start - 2 * first
        values = pairs[:, start : start + len(self.columns)].float()
        of_column = torch.arange(self.columns.start, self.columns.stop) // self.form.group_size - groups.start
        stored = (self.tensors[leaf].narrow(0, groups.start, len(groups)) for leaf in (SCALE, ZERO_POINT))
        of_rows = (numbers_of(each.narrow(1, self.rows.start, len(self.rows))).float().t() for each in stored)
        scales, zeros = (each[:, of_column] for each in of_rows)
        return Codes(values * scales + zeros, torch.ones(len(self.rows), 1))


class TorchAoFormat(CheckpointFormat):
    """The format of torchao, with one kind of weight for all layers."""

    leaves = (QDATA, SCALE, ZERO_POINT, *OTHERS)

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        check_fields(config, FIELDS)
        module_names(config, "modules_to_not_convert")
        refuse_set(config, "quant_type_kwargs")
        kind, fields = _kind_of(config)
        self._is_4bit = kind == "Int4WeightOnlyConfig"
        one_of(fields, "int4_packing_format", ("plain",), default="plain")
        one_of(fields, "intx_packing_format", ("unpacked_to_int8",), default="unpacked_to_int8")
        symmetric = ("symmetric", "symmetric_no_clipping_err")
        self._has_zeros = (
            one_of(fields, "mapping_type", (*symmetric, "asymmetric"), default="symmetric") not in symmetric
        )
        self._bits = BITS[one_of(fields, "weight_dtype", tuple(BITS), default="int8")]
        one_of(fields, "granularity", ("perrow", "peraxis", "pergroup", None))
        self._planned = self._form(fields.get("group_size") or 0)

    @property
    def planned_form(self) -> QuantForm:
        """The form of all matrices."""
        return self._planned

    def _form(self, group_size: int) -> QuantForm:
        if self._is_4bit:
            return QuantForm("torchao", "table", 4, group_size)
        return QuantForm("torchao", "int", self._bits, group_size, has_zeros=self._has_zeros)

    def join_module(self, module: str, tensors: Mapping[str, StoredTensor]) -> Iterable[tuple[str, StoredTensor]]:
        """Yields the matrix of a module."""
        if tensors.keys() != {QDATA, SCALE, ZERO_POINT}:
            raise CheckpointError(
                f"{module} has {', '.join(sorted(tensors))}; implemented are weights with {QDATA}, {SCALE} and "
                f"{ZERO_POINT}; fetch all files, or quantise the model anew with one of {', '.join(KINDS)}"
            )
        codes, scales, zeros = (tensors[leaf] for leaf in (QDATA, SCALE, ZERO_POINT))
        is_4bit = zeros.dtype.is_floating_point
        if is_4bit != self._is_4bit or codes.dtype not in (torch.int8, torch.uint8) or len(codes.shape) != 2:
            raise CheckpointError(
                f"{module}.{QDATA} is of {codes.dtype} with shape {list(codes.shape)}, and {ZERO_POINT} of "
                f"{zeros.dtype}, which is not what config field 'quantization_config.quant_type' says"
            )
        num_rows, num_columns = codes.shape[0], codes.shape[1] * (2 if is_4bit else 1)
        num_groups = scales.shape[0 if is_4bit else -1] if len(scales.shape) == 2 else 1
        asked = [num_groups, num_rows] if is_4bit else [num_rows, num_groups]
        for leaf in (SCALE, ZERO_POINT):
            found = list(tensors[leaf].shape)
            if found != asked and not (num_groups == 1 and not is_4bit and found == [num_rows]):
                raise misshapen(f"{module}.{leaf}", tensors[leaf].shape, asked)
        if not num_groups or num_columns % num_groups:
            raise CheckpointError(f"{module}: {num_groups} groups do not divide its {num_columns} columns")
        size = num_columns // num_groups
        form = replace(self._form(size if is_4bit or num_groups > 1 else 0), scale_dtype=scales.dtype)
        kind = Int4Matrix if is_4bit else Int8Matrix
        yield "weight", kind(module, form, tensors, range(num_rows), range(num_columns))


def _kind_of(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Returns the name of the kind of weight, and its settings; of a setting that is an object, its name or value."""
    given = config.get("quant_type")
    kind = given.get("default") if isinstance(given, Mapping) and len(given) == 1 else given
    name, fields = (kind.get("_type"), kind.get("_data")) if isinstance(kind, Mapping) else (given, None)
    if name not in KINDS or not isinstance(fields, Mapping):
        raise unsupported("quant_type", name, " or ".join(KINDS))
    settings: dict[str, Any] = {}
    for field, value in fields.items():
        is_object = isinstance(value, Mapping) and {"_type", "_data"} <= value.keys()
        data = value["_data"] if is_object else value
        settings[field] = value["_type"] if isinstance(data, Mapping) else data
        if isinstance(data, Mapping) and type(data.get("group_size")) is int:
            settings["group_size"] = data["group_size"]
    return name, settings


FORMAT = TorchAoFormat

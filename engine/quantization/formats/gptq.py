"""`GptqFormat` (`quant_method: gptq`): 2, 3, 4 or 8 bits in groups of columns (Frantar et al., 2022, arXiv:2210.17323).

A matrix `[N, K]` is stored transposed, and the bits of its numbers follow each other in words of 32 bits:

    qweight [K * bits / 32, N] int32,   qzeros [G, N * bits / 32] int32,   scales [G, N] float16,   g_idx [K] int32
    W[n, k] = (qweight[k, n] - zero[g_idx[k], n]) * scales[g_idx[k], n]

Two things are as the writer of a checkpoint liked them:

* Zero points (`checkpoint_format`). "gptq_v2" stores them, "gptq" stores them less one. gptqmodel subtracts the ones of
  a word at once, so that a zero point of 0 borrows from its neighbour, and those of 3 bits at other places of the words
  than its numbers have; other writers subtract one from each number.
* The order of columns (`desc_act`, "act-order"). Columns from all over the row then form a group, and `g_idx` says
  which.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...weights.codes import Codes, QuantForm
from ...weights.packed_bits import VALUES_TOGETHER, unpack_bits
from ...weights.quantised_matrix import QuantisedMatrix, numbers_of
from ...weights.tensor_view import StoredTensor
from ..checkpoint_format import CheckpointFormat
from ..settings import flag, group_size, one_of, refuse_set, unsupported
from ..tensor_checks import check_groups, check_shape, check_there, matrix_shape

__all__ = ["FORMAT", "GptqFormat", "GptqMatrix"]

WORD_ONES = {2: (0x55555555,), 3: (0x24924924, 0x92492492, 0x49249249), 4: (0x11111111,), 8: (0x01010101,)}
"""Bits of a number -> the ones that gptqmodel subtracts from consecutive words of zero points."""

ZeroOffset = Literal["none", "number", "word"]
"""What a checkpoint has subtracted from zero points: nothing, one from each, or `WORD_ONES` from each word."""


@dataclass(frozen=True, slots=True, eq=False)
class GptqMatrix(QuantisedMatrix):
    """A matrix in the layout of GPTQ.

    Attributes:
        bits: Bits of a stored number. Layers have integers of 4 or of 8 bits, of which those of 2 and 3 are a part.
        zero_offset: What was subtracted from the zero points.
    """

    bits: int
    zero_offset: ZeroOffset

    def codes(self) -> Codes:
        """Reads the numbers of this part, and up to 31 beside them in each row and column."""
        group = self._group_of_columns()
        kept = range(self.tensors["scales"].shape[0]) if self.form.act_order else self.group_range
        scales = self.tensors["scales"].narrow(0, kept.start, len(kept)).narrow(1, self.rows.start, len(self.rows))
        values, zeros = self._values(), self._zeros(kept)
        scales = numbers_of(scales).float().t().contiguous()
        if self.form.has_zeros:
            return Codes(values, scales, zeros, group)
        middle = 2 ** (self.bits - 1)
        if not (zeros == middle).all():
            raise CheckpointError(
                f"{self.name}.qzeros has zero points other than {middle}, and quantization_config says sym=true and "
                f"checkpoint_format={self._version!r}; correct the field that is wrong"
            )
        return Codes(values.sub_(middle).view(torch.int8), scales, None, group)

    @property
    def _version(self) -> str:
        return "gptq_v2" if self.zero_offset == "none" else "gptq"

    def _group_of_columns(self) -> Tensor | None:
        """Returns the group of each column; None for whole groups of neighbours."""
        stored = self.tensors.get("g_idx")
        if stored is None:
            return self.column_groups
        group = numbers_of(stored.narrow(0, self.columns.start, len(self.columns))).long()
        if self.form.act_order:
            return group
        size = self.form.group_size or self.columns.stop
        if not torch.equal(group, torch.arange(self.columns.start, self.columns.stop) // size):
            raise CheckpointError(
                f"{self.name}.g_idx has columns out of order, and quantization_config says desc_act=false; set it to "
                "true"
            )
        return self.column_groups

    def _values(self) -> Tensor:
        """Returns the numbers as they are stored, `[rows, columns]` uint8."""
        stored = self.tensors["qweight"].narrow(1, self.rows.start, len(self.rows))
        words, skipped = _whole_words(stored, 0, self.columns, self.bits)
        return unpack_bits(words.t(), self.bits).narrow(1, skipped, len(self.columns)).contiguous()

    def _zeros(self, groups: range) -> Tensor:
        """Returns the zero points of some groups, `[rows, groups]` uint8."""
        bits, stored = self.bits, self.tensors["qzeros"].narrow(0, groups.start, len(groups))
        words, skipped = _whole_words(stored, 1, self.rows, bits)
        if self.zero_offset == "word":
            words = words + torch.tensor(WORD_ONES[bits]).to(torch.int32).repeat(words.shape[1] // len(WORD_ONES[bits]))
        zeros = unpack_bits(words, bits)
        if self.zero_offset == "number":
            zeros = zeros + 1  # Without a mask: other readers take a stored 15 for 16 too.
        return zeros.narrow(1, skipped, len(self.rows)).t().contiguous()


def _whole_words(stored: StoredTensor, dim: int, kept: range, bits: int) -> tuple[Tensor, int]:
    """Returns the words that hold some numbers of a packed dimension, and how many other numbers come before them."""
    first = kept.start // VALUES_TOGETHER
    end = min(-(-kept.stop // VALUES_TOGETHER) * bits, stored.shape[dim])
    words = stored.narrow(dim, first * bits, end - first * bits)
    return numbers_of(words), kept.start - first * VALUES_TOGETHER


@dataclass(frozen=True, slots=True)
class GptqSettings:
    """How matrices are quantised, by the config.

    Attributes:
        bits: Bits of a number.
        size: Neighbouring columns that share a scale; 0 for all.
        sym: Whether all zero points are in the middle of the range.
        desc_act: Whether the columns of a group may be anywhere in the row.
    """

    bits: int
    size: int
    sym: bool
    desc_act: bool

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> GptqSettings:
        """Returns the settings of a config, or of a config with overrides for some modules."""
        refuse_set(config, "adapter", "rotation", "is_marlin_format")
        desc_act = flag(config, "desc_act", default=False)
        return cls(
            one_of(config, "bits", tuple(WORD_ONES)), group_size(config), flag(config, "sym", default=True), desc_act
        )

    @property
    def form(self) -> QuantForm:
        """The form of a matrix with these settings."""
        act_order = self.desc_act and self.size > 0
        return QuantForm("gptq", "int", max(self.bits, 4), self.size, has_zeros=not self.sym, act_order=act_order)


class GptqFormat(CheckpointFormat):
    """The format of GPTQ. Modules without `qweight` are plain, whether or not `dynamic` says so."""

    leaves = ("qweight", "qzeros", "scales", "g_idx")

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        field = "format" if config.get("checkpoint_format") is None else "checkpoint_format"
        version = one_of(config, field, ("gptq", "gptq_v2"), default="gptq")
        one_of(config, "pack_dtype", ("int32",), default="int32")
        flag(config, "lm_head", default=False)
        self._zero_offset: ZeroOffset = "none" if version == "gptq_v2" else _zero_offset(config.get("meta"))
        self._settings = GptqSettings.read(config)
        self._rules = list(_rules(config))

    @property
    def planned_form(self) -> QuantForm:
        """The form of the matrices without a rule of their own."""
        return self._settings.form

    def join_module(self, module: str, tensors: Mapping[str, StoredTensor]) -> Iterable[tuple[str, StoredTensor]]:
        """Yields one matrix for the three or four tensors of a module."""
        check_there(module, tensors, {"qweight": torch.int32, "qzeros": torch.int32, "scales": None})
        settings = next((found for pattern, found in self._rules if pattern.match(module)), self._settings)
        bits, size = settings.bits, settings.size
        num_words, num_rows = matrix_shape(module, "qweight", tensors["qweight"])
        num_columns = num_words * 32 // bits
        num_groups = check_groups(module, num_columns, size)
        asked = {
            "qzeros": [num_groups, num_rows * bits // 32],
            "scales": [num_groups, num_rows],
            "g_idx": [num_columns],
        }
        for leaf, shape in asked.items():
            if leaf in tensors:
                check_shape(module, leaf, tensors[leaf], shape, f"bits={bits}, group_size={size or -1}")
        act_order, scale_dtype = _has_act_order(module, tensors, settings), tensors["scales"].dtype
        form = replace(settings.form, act_order=act_order, scale_dtype=scale_dtype)
        parts = range(num_rows), range(num_columns)
        yield "weight", GptqMatrix(module, form, tensors, *parts, bits, self._zero_offset)


def _zero_offset(meta: Any) -> ZeroOffset:
    """Returns what the writer of a checkpoint in "gptq" subtracts from zero points."""
    quantizer = meta.get("quantizer") if isinstance(meta, Mapping) else None
    return "word" if "gptqmodel" in str(quantizer) else "number"


def _rules(config: Mapping[str, Any]) -> Iterator[tuple[re.Pattern[str], GptqSettings]]:
    """Yields the patterns of `dynamic` in order, and the settings of the modules whose names begin with a match.

    Patterns that begin with "-:" leave modules plain, so there is nothing to read of those.
    """
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise unsupported("dynamic", dynamic, "an object of patterns and settings")
    for pattern, overrides in dynamic.items():
        if pattern.startswith("-:"):
            continue
        if not isinstance(overrides, Mapping):
            raise unsupported("dynamic", {pattern: overrides}, "an object of patterns and settings")
        try:
            compiled = re.compile(pattern.removeprefix("+:"))
        except re.error as error:
            raise unsupported("dynamic", pattern, f"a regular expression ({error})") from error
        yield compiled, GptqSettings.read({**config, **overrides})


def _has_act_order(module: str, tensors: Mapping[str, StoredTensor], settings: GptqSettings) -> bool:
    """Returns whether the columns of groups are out of order; raises if their groups are not those of the scales.

    The groups are only read if they are mapped, or if the config says that they are out of order.
    """
    stored = tensors.get("g_idx")
    if stored is None:
        if settings.desc_act and settings.size:
            raise CheckpointError(
                f"{module} lacks g_idx, and quantization_config says desc_act=true; fetch all files of the checkpoint"
            )
        return False
    if not isinstance(stored, Tensor) and not settings.desc_act:
        return False
    group, num_groups = numbers_of(stored), tensors["scales"].shape[0]
    size = len(group) // num_groups
    if torch.equal(group, torch.arange(len(group), dtype=group.dtype) // size):
        return False
    if int(group.min()) < 0 or (group.bincount(minlength=num_groups) != size).any():
        raise CheckpointError(
            f"{module}.g_idx does not put {size} columns into each of {num_groups} groups; quantise the model again"
        )
    return True


FORMAT = GptqFormat

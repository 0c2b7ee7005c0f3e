"""`AwqFormat` (`quant_method: awq`): 4 bits in groups of columns, with zero points.

Lin et al., "AWQ: Activation-aware Weight Quantization", 2023, arXiv:2306.00978.

A matrix `[N, K]` is stored transposed, eight columns of N in a word of 32 bits:

    qweight [K, N / 8] int32,   qzeros [K / group, N / 8] int32,   scales [K / group, N] float16
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, UnsupportedModelError, quote
from ...weights.codes import Codes, QuantForm
from ...weights.quantised_matrix import QuantisedMatrix, numbers_of
from ...weights.tensor_layout import misshapen
from ...weights.tensor_view import StoredTensor
from ..checkpoint_format import CheckpointFormat

__all__ = ["FORMAT", "AwqFormat"]

BITS, PER_WORD = 4, 8

SHIFTS = tuple(BITS * place for place in (0, 4, 1, 5, 2, 6, 3, 7))
"""The bits of a word at which each of its eight columns begins."""


@dataclass(frozen=True, slots=True, eq=False)
class AwqMatrix(QuantisedMatrix):
    """A matrix in the layout of AWQ."""

    def codes(self) -> Codes:
        """Reads the numbers of this part: of qweight, whole words of the rows."""
        groups = self.group_range
        scales = self.tensors["scales"].narrow(0, groups.start, len(groups))
        scales = scales.narrow(1, self.rows.start, len(self.rows))
        return Codes(
            values=self._columns_of("qweight", self.columns),
            scales=numbers_of(scales).float().t().contiguous(),
            zeros=self._columns_of("qzeros", groups),
            groups=self.column_groups,
        )

    def _columns_of(self, leaf: str, kept: range) -> Tensor:
        """Returns `[rows, kept]` uint8: the numbers of a packed tensor whose first dimension is cut to `kept`."""
        first, end = self.rows.start // PER_WORD, -(-self.rows.stop // PER_WORD)
        words = numbers_of(self.tensors[leaf].narrow(0, kept.start, len(kept)).narrow(1, first, end - first))
        numbers = (words.unsqueeze(-1) >> torch.tensor(SHIFTS, dtype=torch.int32)) & 15
        start = self.rows.start - first * PER_WORD
        return numbers.to(torch.uint8).flatten(1)[:, start : start + len(self.rows)].t().contiguous()


class AwqFormat(CheckpointFormat):
    """The format of AWQ, version "gemm"."""

    leaves = ("qweight", "qzeros", "scales")

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        bits, version = config.get("bits", config.get("w_bit")), config.get("version", "gemm")
        if bits != BITS:
            raise UnsupportedModelError(f"config field 'quantization_config.bits' is {quote(bits)}; AWQ has 4")
        if not isinstance(version, str) or version.lower() != "gemm":
            raise UnsupportedModelError(
                f"config field 'quantization_config.version' is {quote(version)}; implemented is gemm"
            )
        size = config.get("group_size", config.get("q_group_size"))
        if not isinstance(size, int) or isinstance(size, bool) or not (size == -1 or size > 0):
            raise UnsupportedModelError(
                f"config field 'quantization_config.group_size' is {quote(size)}; it must be -1 or a positive integer"
            )
        self._form = QuantForm("awq", "int", BITS, max(size, 0), has_zeros=True)

    @property
    def planned_form(self) -> QuantForm:
        """The form of all matrices."""
        return self._form

    def join_module(self, module: str, tensors: Mapping[str, StoredTensor]) -> Iterable[tuple[str, StoredTensor]]:
        """Yields one matrix for the three tensors of a module."""
        missing = [leaf for leaf in self.leaves if leaf not in tensors]
        if missing:
            raise CheckpointError(f"{module} has no {', '.join(missing)}; AWQ stores {', '.join(self.leaves)}")
        num_columns, num_words = tensors["qweight"].shape
        size = self._form.group_size or num_columns
        if num_columns % size:
            raise CheckpointError(f"{module}: groups of {size} columns do not divide its {num_columns} columns")
        asked = {"qzeros": [num_columns // size, num_words], "scales": [num_columns // size, num_words * PER_WORD]}
        for leaf, shape in asked.items():
            if list(tensors[leaf].shape) != shape:
                raise misshapen(f"{module}.{leaf}", tensors[leaf].shape, shape)
        columns = range(num_columns)
        form = replace(self._form, scale_dtype=tensors["scales"].dtype)
        yield "weight", AwqMatrix(module, form, tensors, range(num_words * PER_WORD), columns)


FORMAT = AwqFormat

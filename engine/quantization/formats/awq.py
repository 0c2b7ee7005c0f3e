"""`AwqFormat` (`quant_method: awq`): 4 bits in groups of columns, with zero points (Lin et al., arXiv:2306.00978).

A matrix `[N, K]` is stored transposed, with eight columns of N in a word of 32 bits (the layout "gemm" of autoawq):

    qweight [K, N / 8] int32,   qzeros [K / group, N / 8] int32,   scales [K / group, N] float16
    W[n, k] = (qweight[k, n] - qzeros[k / group, n]) * scales[k / group, n]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...weights.codes import Codes, QuantForm
from ...weights.packed_bits import unpack_bits
from ...weights.quantised_matrix import QuantisedMatrix, numbers_of
from ...weights.tensor_view import StoredTensor
from ..checkpoint_format import CheckpointFormat
from ..settings import flag, group_size, one_of, unsupported
from ..tensor_checks import check_groups, check_shape, check_there, matrix_shape

__all__ = ["FORMAT", "AwqFormat", "AwqMatrix"]

BITS, PER_WORD = 4, 8

PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""The place in a word of each of its eight columns, counted from the lowest bits."""


@dataclass(frozen=True, slots=True, eq=False)
class AwqMatrix(QuantisedMatrix):
    """A matrix in the layout of AWQ."""

    def codes(self) -> Codes:
        """Reads the numbers of this part, and those that share a word with them."""
        groups = self.group_range
        scales = self.tensors["scales"].narrow(0, groups.start, len(groups)).narrow(1, self.rows.start, len(self.rows))
        return Codes(
            values=self._unpack("qweight", self.columns),
            scales=numbers_of(scales).float().t().contiguous(),
            zeros=self._unpack("qzeros", groups),
            groups=self.column_groups,
        )

    def _unpack(self, leaf: str, kept: range) -> Tensor:
        """Returns `[rows, kept]` uint8: the numbers of a packed tensor whose first dimension is cut to `kept`."""
        first, end = self.rows.start // PER_WORD, -(-self.rows.stop // PER_WORD)
        words = numbers_of(self.tensors[leaf].narrow(0, kept.start, len(kept)).narrow(1, first, end - first))
        numbers = unpack_bits(words, BITS).unflatten(1, (-1, PER_WORD))[..., PLACES].flatten(1)
        return numbers.narrow(1, self.rows.start - first * PER_WORD, len(self.rows)).t().contiguous()


class AwqFormat(CheckpointFormat):
    """The format of AWQ in the layout "gemm".

    The modules that `modules_to_not_convert` names are plain, and so are others without `qweight`.
    """

    leaves = ("qweight", "qzeros", "scales")

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        one_of(config, "w_bit" if "w_bit" in config else "bits", (BITS,))
        one_of(config, "format" if config.get("version") is None else "version", ("gemm",), default="gemm")
        if config.get("backend") == "llm-awq":
            raise unsupported("backend", "llm-awq", "autoawq: the layout of llm-awq is another one")
        if not flag(config, "zero_point", default=True):
            raise unsupported("zero_point", False, "true")
        if not all(pattern.startswith("-:") for pattern in config.get("dynamic") or ()):
            raise unsupported("dynamic", config["dynamic"], 'patterns that begin with "-:" and leave modules plain')
        size = group_size(config, "q_group_size" if "q_group_size" in config else "group_size")
        self._form = QuantForm("awq", "int", BITS, size, has_zeros=True)

    @property
    def planned_form(self) -> QuantForm:
        """The form of all matrices."""
        return self._form

    def join_module(self, module: str, tensors: Mapping[str, StoredTensor]) -> Iterable[tuple[str, StoredTensor]]:
        """Yields one matrix for the three tensors of a module."""
        check_there(module, tensors, {"qweight": torch.int32, "qzeros": torch.int32, "scales": None})
        num_columns, num_words = matrix_shape(module, "qweight", tensors["qweight"])
        num_groups = check_groups(module, num_columns, self._form.group_size)
        asked = {"qzeros": [num_groups, num_words], "scales": [num_groups, num_words * PER_WORD]}
        for leaf, shape in asked.items():
            check_shape(module, leaf, tensors[leaf], shape, f"group_size={self._form.group_size or -1}")
        form = replace(self._form, scale_dtype=tensors["scales"].dtype)
        yield "weight", AwqMatrix(module, form, tensors, range(num_words * PER_WORD), range(num_columns))


FORMAT = AwqFormat

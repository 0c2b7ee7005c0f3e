"""`QuantisedMatrix`: the tensors of one quantised matrix of a checkpoint, as one tensor whose numbers are read later.

A checkpoint has several tensors for such a matrix, such as `X.qweight`, `X.qzeros` and `X.scales`. The loader sees one,
`X.weight`, in the shape that it has in the unquantised model. So names, fused parts, experts and shards are the same
for all formats. A layer either takes the stored numbers (`codes`), or dequantised ones (`read`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from .codes import Codes, QuantForm
from .tensor_view import StoredTensor, codes_of

__all__ = ["QuantisedMatrix", "numbers_of"]


@dataclass(frozen=True, slots=True, eq=False)
class QuantisedMatrix:
    """A quantised matrix `[out_features, in_features]`, or a part of one. A format derives a class from it.

    Attributes:
        name: The checkpoint's name of the module.
        form: How the numbers are quantised.
        tensors: The stored tensors by the last part of their names.
        rows: The rows of this part, among those of the whole matrix.
        columns: The columns of this part.
    """

    name: str
    form: QuantForm
    tensors: Mapping[str, StoredTensor] = field(repr=False)
    rows: range
    columns: range

    @property
    def dtype(self) -> torch.dtype:
        """Number type of the dequantised numbers."""
        return torch.float32

    @property
    def shape(self) -> torch.Size:
        """Shape of this part of the matrix."""
        return torch.Size((len(self.rows), len(self.columns)))

    def narrow(self, dim: int, start: int, length: int) -> Self:
        """Returns the given range of dimension `dim`, like `torch.Tensor.narrow`; no numbers are read."""
        kept = (self.rows, self.columns)[dim][start : start + length]
        return replace(self, columns=kept) if dim else replace(self, rows=kept)

    def read(self) -> Tensor:
        """Reads the numbers and returns them dequantised, in float32."""
        return codes_of(self).dequantise()

    @abstractmethod
    def codes(self) -> Codes:
        """Reads the numbers as they are quantised.

        If the part does not begin and end with a group of columns, `Codes.groups` says which group a column is in.
        """

    @property
    def column_groups(self) -> Tensor | None:
        """The group of each column among those that this part touches; None if the part has whole groups."""
        size = self.form.group_size
        if not size or (self.columns.start % size == 0 and len(self.columns) % size == 0):
            return None
        return torch.arange(self.columns.start, self.columns.stop) // size - self.group_range.start

    @property
    def group_range(self) -> range:
        """The groups of columns that this part touches."""
        size = self.form.group_size
        return range(self.columns.start // size, -(-self.columns.stop // size)) if size else range(1)


def numbers_of(tensor: StoredTensor) -> Tensor:
    """Returns the numbers of a stored tensor."""
    return tensor if isinstance(tensor, Tensor) else tensor.read()

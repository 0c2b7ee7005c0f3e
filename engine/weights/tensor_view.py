"""Views of stored tensors, whose numbers are read when they are used: of some rows (`TensorView`) or of one index."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from ..errors import CheckpointError
from .codes import Codes, QuantForm

__all__ = ["StoredTensor", "TensorItem", "TensorView", "UnreadTensor", "codes_of", "form_of"]


class UnreadTensor(Protocol):
    """A tensor whose numbers are not read yet, such as a `FileTensor`."""

    @property
    def dtype(self) -> torch.dtype:
        """Number type of the tensor."""
        ...

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor."""
        ...

    def narrow(self, dim: int, start: int, length: int) -> UnreadTensor:
        """Returns the given range of dimension `dim`, like `torch.Tensor.narrow`; no numbers are read."""
        ...

    def read(self) -> Tensor:
        """Reads the numbers and returns them as a tensor."""
        ...


StoredTensor: TypeAlias = Tensor | UnreadTensor
"""A tensor whose numbers are read when they are used: from a mapped file, from a URL, or as a view of one of these."""


@dataclass(frozen=True, slots=True, eq=False)
class TensorView:
    """Some rows of a stored tensor, which may be transposed.

    A rank that holds a shard narrows the view before it is read. Of the stored tensor only the range from the first to
    the last of the remaining rows is then read.

    Attributes:
        source: The stored tensor.
        dim: Dimension of the source that has the rows.
        rows: `[num_rows]` int64, the rows of the source in the order of the view.
        transposed: Whether the view has dimensions `dim - 1` and `dim` of the source in exchanged places.
    """

    source: StoredTensor
    dim: int
    rows: Tensor
    transposed: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Number type of the tensor."""
        return self.source.dtype

    @property
    def shape(self) -> torch.Size:
        """Shape of the view."""
        sizes = [*self.source.shape]
        sizes[self.dim] = len(self.rows)
        return torch.Size(sizes[self._source_dim(dim)] for dim in range(len(sizes)))

    def narrow(self, dim: int, start: int, length: int) -> TensorView:
        """Returns the given range of dimension `dim`, like `torch.Tensor.narrow`; no numbers are read."""
        dim = self._source_dim(dim)
        if dim == self.dim:
            return replace(self, rows=self.rows.narrow(0, start, length))
        return replace(self, source=self.source.narrow(dim, start, length))

    def read(self) -> Tensor:
        """Reads the numbers and returns them as a tensor."""
        first, end = (int(self.rows.min()), int(self.rows.max()) + 1) if len(self.rows) else (0, 0)
        part = self.source.narrow(self.dim, first, end - first)
        numbers = part if isinstance(part, Tensor) else part.read()
        chosen = numbers.index_select(self.dim, self.rows - first)
        return chosen.transpose(self.dim - 1, self.dim) if self.transposed else chosen

    @property
    def form(self) -> QuantForm | None:
        """How the numbers are quantised; None if they are not, or if they are columns of the stored matrix."""
        return None if self.transposed or self.dim else form_of(self.source)

    def codes(self) -> Codes:
        """Reads the numbers of a quantised matrix as they are quantised."""
        first, end = (int(self.rows.min()), int(self.rows.max()) + 1) if len(self.rows) else (0, 0)
        return codes_of(self.source.narrow(0, first, end - first)).rows(self.rows - first)

    def _source_dim(self, dim: int) -> int:
        """Returns the dimension of the source that is dimension `dim` of the view."""
        return {self.dim: self.dim - 1, self.dim - 1: self.dim}.get(dim, dim) if self.transposed else dim


@dataclass(frozen=True, slots=True, eq=False)
class TensorItem:
    """One index of the first dimension of a stored tensor, such as the matrix of one expert.

    Attributes:
        source: The stored tensor.
        index: The index; the view does not have the dimension.
    """

    source: StoredTensor
    index: int

    @property
    def dtype(self) -> torch.dtype:
        """Number type of the tensor."""
        return self.source.dtype

    @property
    def shape(self) -> torch.Size:
        """Shape of the view."""
        return self.source.shape[1:]

    def narrow(self, dim: int, start: int, length: int) -> TensorItem:
        """Returns the given range of dimension `dim`, like `torch.Tensor.narrow`; no numbers are read."""
        return replace(self, source=self.source.narrow(dim + 1, start, length))

    def read(self) -> Tensor:
        """Reads the numbers and returns them as a tensor."""
        part = self.source.narrow(0, self.index, 1)
        return (part if isinstance(part, Tensor) else part.read())[0]

    @property
    def form(self) -> QuantForm | None:
        """How the numbers are quantised; None if they are not."""
        return form_of(self.source)

    def codes(self) -> Codes:
        """Reads the numbers of a quantised matrix as they are quantised."""
        return codes_of(self.source.narrow(0, self.index, 1)).rows(torch.tensor(0))


def form_of(tensor: StoredTensor) -> QuantForm | None:
    """Returns how the numbers of a stored tensor are quantised; None if they are not."""
    return getattr(tensor, "form", None)


def codes_of(tensor: StoredTensor) -> Codes:
    """Reads the numbers of a stored tensor that has a form, as they are quantised.

    Raises:
        CheckpointError: A scale, or a number of a table, is infinite or not a number.
    """
    codes: Codes = tensor.codes()  # type: ignore[union-attr]
    if not all(numbers.isfinite().all() for numbers in (codes.scales, codes.values) if numbers.dtype == torch.float32):
        raise CheckpointError(
            f"the scales of {getattr(tensor, 'name', 'experts')} hold NaN or infinite numbers; fetch the checkpoint "
            "again, or quantise the model again"
        )
    return codes

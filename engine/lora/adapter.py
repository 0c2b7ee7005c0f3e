"""`Adapter`: the updates of a model's matrices that a LoRA adapter holds, in the memory of the host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

__all__ = ["Adapter", "LowRank", "NewRows"]


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """The update of one matrix as a product of two narrow ones (Hu et al., 2021, arXiv:2106.09685): W' = W + b a.

    A token embedding is the matrix that maps the unit vector of a token to its embedding, so its `in_features` are the
    tokens.

    Attributes:
        a: `[rank, in_features]` in the dtype of the model.
        b: `[out_features, rank]` in the dtype of the model, the scale of the adapter included.
    """

    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        """Number of rows of `a`."""
        return len(self.a)


@dataclass(frozen=True, slots=True, eq=False)
class NewRows:
    """Rows that an adapter puts in the place of rows of a table: the embeddings or the head's rows of some tokens.

    Attributes:
        indices: `[num_rows]` int64, ascending: which rows of the table they replace.
        rows: `[num_rows, size]` in the dtype of the model.
    """

    indices: Tensor
    rows: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """An adapter that was read and checked against the model. Its matrices are whole: ranks cut their parts of them.

    Attributes:
        name: Name of the adapter.
        digest: Hash of the content of the adapter's files. The block hashes of its sequences begin with it.
        updates: Our path of a fused part of a linear layer, such as `layers.3.attention.qkv.query` or
            `layers.3.mlp.down`, -> the update of its matrix.
        num_bytes: Bytes of all tensors.
        new_rows: Our path of the token embedding or of an output head -> the rows that replace some of its own.
            An update of the same matrix is added to the new rows too.
    """

    name: str
    digest: bytes
    updates: Mapping[str, LowRank]
    num_bytes: int
    new_rows: Mapping[str, NewRows] = field(default_factory=dict)

"""`TensorLayout`: how a checkpoint stores the weights of a module that it fuses or transposes, and we do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..errors import CheckpointError
from .tensor_view import StoredTensor, TensorView, form_of

__all__ = ["TensorLayout", "misshapen"]


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """The layout of a checkpoint's tensors (a matrix, its bias) that are cut into weights of ours.

    Rows are outputs of a linear layer. A tensor of two parts, A and B, in three groups has the first third of A's rows,
    the first third of B's rows, the second third of A's rows, and so on.

    Attributes:
        parts: Names of our fused parts that the tensor holds, in order; one empty name for a tensor that is not fused.
        num_groups: Number of groups through which all parts run: the number of KV heads, if a checkpoint has the
            query, key and value of one head together.
        transposed: Whether matrices are stored as `[in_features, out_features]`.
        dim: Dimension of our tensors that has the rows.
        stacked: Whether the first dimension counts experts, each of which has these parts. The other attributes are
            those of the tensor of one expert. In our name of the whole tensor, `*` stands for the number of the expert.
    """

    parts: tuple[str, ...] = ("",)
    num_groups: int = 1
    transposed: bool = False
    dim: int = 0
    stacked: bool = False

    def names(self, ours: str) -> list[str]:
        """Returns our names of the parts of a tensor.

        Args:
            ours: Our name of the whole tensor, e.g. `layers.0.attention.qkv.weight`.
        """
        module, _, leaf = ours.rpartition(".")
        return [f"{module}.{part}.{leaf}" if part else ours for part in self.parts]

    def cut(self, name: str, tensor: StoredTensor, shapes: Sequence[torch.Size]) -> list[TensorView]:
        """Returns the parts of a tensor. No numbers are read.

        A quantised matrix is not transposed: those who quantise a model quantise the matrices of its linear layers.

        Args:
            name: The checkpoint's name of the tensor.
            tensor: The checkpoint's tensor.
            shapes: Whole shape of each part, as in our model.

        Raises:
            CheckpointError: The tensor has another shape than that of all parts together.
        """
        if self.transposed and form_of(tensor) is not None:
            return replace(self, transposed=False).cut(name, tensor, shapes)
        asked = self.stored_shape(shapes)
        if list(tensor.shape) != asked:
            raise misshapen(name, tensor.shape, asked)
        swaps = self._swaps(shapes)
        dim = self.dim + swaps
        groups = torch.arange(asked[dim]).view(self.num_groups, -1)
        lengths = [shape[self.dim] // self.num_groups for shape in shapes]
        return [TensorView(tensor, dim, rows.flatten(), swaps) for rows in groups.split(lengths, dim=1)]

    def stored_shape(self, shapes: Sequence[torch.Size]) -> list[int]:
        """Returns the shape of the tensor that holds all parts, or of one item of a stacked tensor.

        Args:
            shapes: Whole shape of each part, as in our model.
        """
        sizes = [*shapes[0]]
        sizes[self.dim] = sum(shape[self.dim] for shape in shapes)
        if self._swaps(shapes):
            sizes[self.dim], sizes[self.dim + 1] = sizes[self.dim + 1], sizes[self.dim]
        return sizes

    def _swaps(self, shapes: Sequence[torch.Size]) -> bool:
        return self.transposed and len(shapes[0]) >= self.dim + 2


def misshapen(name: str, found: Sequence[int], asked: Sequence[int]) -> CheckpointError:
    """Returns the error about a tensor that has another shape than the model."""
    return CheckpointError(
        f"{name} has shape {list(found)} in the checkpoint, and config.json asks for {list(asked)}; check that "
        "config.json and the weights belong together"
    )

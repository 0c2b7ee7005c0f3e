"""Checks of the tensors of one quantised matrix in a checkpoint: all are there, with their number types and shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..errors import CheckpointError
from ..weights.tensor_view import StoredTensor

__all__ = ["check_groups", "check_shape", "check_there", "matrix_shape"]


def check_there(module: str, tensors: Mapping[str, StoredTensor], kinds: Mapping[str, torch.dtype | None]) -> None:
    """Raises if a tensor of a matrix is missing, or has another number type.

    Args:
        module: The checkpoint's name of the module.
        tensors: The tensors by the last part of their names.
        kinds: The number type of each tensor that the matrix needs; None for any floating-point type.

    Raises:
        CheckpointError: A tensor is missing, or has another number type.
    """
    missing = [leaf for leaf in kinds if leaf not in tensors]
    if missing:
        raise CheckpointError(
            f"{module} has {', '.join(sorted(tensors))} and lacks {', '.join(missing)}; fetch all files of the "
            "checkpoint, or quantise the model again"
        )
    for leaf, kind in kinds.items():
        found = tensors[leaf].dtype
        if found != kind if kind else not found.is_floating_point:
            raise CheckpointError(
                f"{module}.{leaf} is of {found}, and its format has {kind or 'floating-point numbers'} there; check "
                "that quantization_config and the weights belong together"
            )


def check_shape(module: str, leaf: str, tensor: StoredTensor, asked: Sequence[int], why: str) -> None:
    """Raises if a tensor has another shape than `why`, the values of fields of quantization_config, asks for."""
    if list(tensor.shape) != list(asked):
        raise CheckpointError(
            f"{module}.{leaf} has shape {list(tensor.shape)} in the checkpoint, and {why} in quantization_config asks "
            f"for {list(asked)}; check that quantization_config and the weights belong together"
        )


def matrix_shape(module: str, leaf: str, tensor: StoredTensor) -> tuple[int, int]:
    """Returns the shape of a tensor that must have two dimensions; raises if it has another number of them."""
    if len(tensor.shape) != 2:
        raise CheckpointError(
            f"{module}.{leaf} has shape {list(tensor.shape)}, and its format has two dimensions there; use a "
            "checkpoint with a tensor for each matrix"
        )
    num_rows, num_columns = tensor.shape
    return num_rows, num_columns


def check_groups(module: str, num_columns: int, size: int) -> int:
    """Returns the number of groups of a matrix; raises if groups of `size` columns do not divide it.

    Args:
        module: The checkpoint's name of the module.
        num_columns: Columns of the matrix.
        size: Columns of a group; 0 for all columns.

    Raises:
        CheckpointError: The groups do not divide the columns.
    """
    if size and num_columns % size:
        raise CheckpointError(
            f"group_size={size} in quantization_config does not divide the {num_columns} columns of {module}; quantise "
            "the model again with a group_size that does"
        )
    return num_columns // size if size else 1
